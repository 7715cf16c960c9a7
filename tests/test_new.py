"""`prunet new`: for each layout and form of a teacher, a recipe that a run accepts as it is."""

from pathlib import Path

import pytest
import yaml
from conftest import make_pictures, make_pipeline
from test_cli import call

from prunet import Run, Runtime, Teacher, UserError, load_recipe
from prunet.exports.single_file import export_single_file
from prunet.recipe.values import Drawing
from prunet.runs import estimate, new
from prunet.runs.new import new_recipe, parse_budget

CPU = Runtime(device="cpu", precision="no")
EMOJI = Path(__file__).parent.parent / "emoji"


@pytest.fixture(autouse=True)
def no_step(monkeypatch) -> None:
    """Simulating a step takes seconds, and other tests do it."""
    monkeypatch.setattr(estimate, "step_memory", lambda *args, **options: 2**20)


@pytest.fixture(scope="session")
def v_prediction(once) -> Path:
    return once("v_prediction", lambda folder: make_pipeline(folder, "sd", prediction_type="v_prediction"))


def single_file(folder: Path, pipeline: Path) -> Path:
    return export_single_file(pipeline, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("emoji-sd", ["emoji-sd: sd-v1, 128 px, predicts epsilon", "license: cc-by-4.0   #", "plan: bk-small"]),
        ("emoji-xl", ["emoji-xl: sdxl, 128 px, predicts epsilon", "level: layer", "plan: ssd-1b"]),
        ("v", ["sd-v1, 16 px, predicts v_prediction", "license: null "]),
        ("file", ["model.safetensors: sd-v1, 16 px, predicts epsilon", "license: null "]),
    ],
)
def test_a_run_accepts_it_as_it_is(kind, words, sd, v_prediction, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pipe = {"v": lambda: v_prediction, "file": lambda: single_file(tmp_path, sd)}
    teacher = make_pipe.get(kind, lambda: EMOJI / kind)()
    text = new_recipe(str(teacher), str(pictures), runtime=CPU)
    assert all(word in text for word in words), text
    assert "12 pictures, none without a caption." in text and "20 x 20 to 22 x 20 px" in text
    elsewhere = tmp_path / "elsewhere" / "mine.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(text)
    run = Run(load_recipe(elsewhere), CPU)
    run.check()
    assert run.folder.parent == tmp_path / "elsewhere" / "runs" and run.size == run.teacher.native_size
    assert max(map(len, text.splitlines())) < 160 + len(str(tmp_path))


def test_prompts_a_plan_and_a_budget(sd, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    text = new_recipe(str(sd), str(tmp_path / "prompts.txt"), plan="bk-tiny", budget=10**5, runtime=CPU)
    recipe = yaml.safe_load(text)
    assert recipe["plan"] == "bk-tiny" and recipe["data"]["prompts"] == str(tmp_path / "prompts.txt")
    (stage,) = recipe["stages"]  # learns from the teacher alone, since the latents are the teacher's too
    assert stage["losses"]["task"] == 0 and stage["random_captions"]
    assert "It does not fit" in text and "--micro-batch 1 --gradient-checkpointing" in text
    with pytest.raises(UserError, match=r"No plan 'bk-tin'.*did you mean"):
        new_recipe(str(sd), str(tmp_path / "prompts.txt"), plan="bk-tin", runtime=CPU)


def test_losses_of_layers_are_normalised(sdxl, sd, pictures) -> None:
    said = {"vega": "The recipe vega has 250,000 steps of 128 in 3 stages.", "bk-tiny": "has 50,000 steps of 256."}
    for folder, plan, level in ((sdxl, "vega", "layer"), (sd, "bk-tiny", "block")):
        text = new_recipe(str(folder), str(pictures), plan=plan, runtime=CPU)
        assert said[plan] in text
        (stage,) = yaml.safe_load(text)["stages"]
        assert stage["losses"]["level"] == level
        assert stage["losses"].get("normalize", False) == (level == "layer")
        assert stage["losses"]["output"] == stage["losses"]["feature"] == 1
    assert not load_recipe("vega").stages[-1].losses.normalize  # as published


@pytest.mark.parametrize(("jumps", "path_steps"), [(1, 24), (4, 24), (5, 20)])
def test_few_steps(jumps, path_steps, sd, pictures, tmp_path) -> None:
    """Settings of the second stage that do not depend on the data equal those of a shipped recipe."""
    path = tmp_path / "mine.yaml"
    path.write_text(new_recipe(str(sd), str(pictures), plan="bk-tiny", jumps=jumps, runtime=CPU))
    Run(recipe := load_recipe(path), CPU).check()
    assert recipe.output.endswith(f"-bk-tiny-{jumps}-steps")
    size, steps = recipe.stages
    assert size.losses.task == 1 and not size.random_captions
    assert (steps.jumps, steps.path_steps, steps.paths) == (jumps, path_steps, 2000)
    assert recipe.made_for == Drawing(steps=jumps, guidance_scale=1, sampler="ddim-trailing")
    shipped = load_recipe("bk-tiny-few-steps").stages
    assert steps.steps / size.steps == shipped[1].steps / shipped[0].steps
    for key in ("objective", "guidance_scale", "learning_rate", "schedule", "weight_decay", "max_grad_norm"):
        assert getattr(steps, key) == getattr(shipped[1], key)


def test_jumps_that_no_sampler_makes_are_refused(sd, pictures) -> None:
    with pytest.raises(UserError, match=r"^--jumps 7: give a divisor of the teacher's 1000 timesteps"):
        new_recipe(str(sd), str(pictures), jumps=7, runtime=CPU)
    with pytest.raises(UserError, match=r"^--jumps 2000: give a divisor"):
        new_recipe(str(sd), str(pictures), jumps=2000, runtime=CPU)


def test_options_that_save_memory_come_in_the_order_of_their_cost(sd, pictures, tmp_path) -> None:
    """For GPUs of several sizes: the less memory, the more options."""
    gpu, said = Runtime(device="cuda", precision="bf16"), []
    path = tmp_path / "mine.yaml"
    path.write_text(new_recipe(str(sd), str(pictures), runtime=CPU))
    run = Run(load_recipe(path), gpu)
    least = [new._fit(run, new.SAVING["cuda"][:count], 0).needs for count in range(5)]  # in micro-batches of 1
    assert least == sorted(least, reverse=True) and len(set(least)) == 5
    said += [new.fit_to(run, budget).options for budget in least]
    assert all(new.SAVING["cuda"][: len(options)] == options for options in said)
    assert [len(options) for options in said] == sorted(len(options) for options in said) and len(said[-1]) == 4


def test_what_is_seen_of_the_pictures_is_reported(sd, tmp_path) -> None:
    make_pictures(tmp_path / "pictures", 4, size=12)
    (tmp_path / "pictures" / "000.txt").unlink()
    (tmp_path / "pictures" / "001.txt").write_text("a\nb\n")
    (tmp_path / "pictures" / "002.png").write_bytes(b"")
    text = new_recipe(str(sd), str(tmp_path / "pictures"), runtime=CPU)
    assert "4 pictures, 1 without a caption, up to 2 captions each." in text
    assert "1 of the first 3 cannot be read and will be skipped. The first: 002.png: the file is empty" in text
    assert "2 of them are smaller than 16 px" in text
    assert "1,000 steps of 32 see each sample 8,000 times" in text and "learned by heart" in text
    assert "The recipe bk-small-sd-v1.4 has 50,000 steps of 256. More" in text
    assert "prunet run mine.yaml  " in text  # without options: a run finds the micro-batch itself


@pytest.mark.parametrize("facts", [{"count": None}, {"count": 10_000, "or_more": True}])
def test_data_that_are_not_counted_may_be_many(facts, sd, pictures, monkeypatch) -> None:
    """A dataset of the hub, or more pictures than are counted: steps for many of them, and each path is seen."""
    counted = new.data_facts(str(pictures), 16)
    monkeypatch.setattr(new, "data_facts", lambda data, size: counted | facts)
    text = new_recipe(str(sd), str(pictures), jumps=4, runtime=CPU)
    first, second = yaml.safe_load(text)["stages"]
    assert first["steps"] == 50_000 and second["steps"] * second["batch_size"] >= second["paths"] == 50_000
    assert ("see each sample at most 160 times" in text) == (facts["count"] is not None)


def test_budget() -> None:
    assert parse_budget("24GB") == parse_budget("24 GiB") == int(0.9 * 24 * 2**30)
    for text in ("24", "lots", "0GB", "-1GB"):
        with pytest.raises(UserError, match="such as 24GB"):
            parse_budget(text)


def test_command(capsys, sd, pictures, tmp_path) -> None:
    code, out, err = call(capsys, "new", "--teacher", sd, "--data", pictures, "--budget", "24GB")
    (tmp_path / "mine.yaml").write_text(out)
    assert code == 0 and not err and "a GPU" in out
    assert load_recipe(tmp_path / "mine.yaml").teacher.source == str(sd)
    assert Teacher(load_recipe(tmp_path / "mine.yaml").teacher.source).layout == "sd-v1"
    code, _, err = call(capsys, "new", "--teacher", sd)
    assert code == 2 and "--data" in err
    code, _, err = call(capsys, "new", "--teacher", sd, "--data", tmp_path / "none")
    assert code == 2 and "none" in err
