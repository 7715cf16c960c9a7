"""The whole job on a small pipeline: finished steps are skipped, kills are survived, mistakes are refused early."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_pictures, make_pipeline
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from prunet import Run, Runtime, Teacher, UserError, load_recipe, run
from prunet.data.cache import Cache
from prunet.disk.files import read_json, write_json
from prunet.recipe.recipe import Recipe
from prunet.runs.disk import SLACK, cache_bytes, check_disk, checkpoint_bytes, known_samples, path_bytes
from prunet.runs.fingerprints import _hash, stage_label, step_inputs
from prunet.runs.steps import logged_seconds
from prunet.student.student import inherit

CPU = Runtime(device="cpu", precision="no", log_every=1)


def recipe_file(folder: Path, source: Path, pictures: Path, **changes) -> Path:
    value = {
        "teacher": str(source),
        "plan": "bk-small",
        "data": {"source": str(pictures), "flip": True},
        "stages": [{"steps": 4, "batch_size": 4, "warmup_steps": 1}, {"steps": 2, "batch_size": 4}],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 2},
        "sheet": {"every": 2},
        "output": str(folder / "run"),
        "checkpoint_every": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return path


def contents(folder: Path) -> dict[str, str]:
    """Returns hashes of a run's files without times: weights, caches, pictures, plan, log rows without speeds."""
    out = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix in (".safetensors", ".png", ".pt") or file.name in ("plan.json", "config.json", "cache.json"):
            out[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "log.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            out[name] = json.dumps([{k: v for k, v in row.items() if k != "images_per_s"} for row in rows])
        elif file.name == "evaluation.json":
            out[name] = json.dumps(json.loads(file.read_text())["distance"])
    return out


@pytest.fixture(scope="session")
def finished(sd, pictures, once) -> Path:
    """A finished run of two stages; tests do not change it."""
    stages = [{"steps": 2, "batch_size": 4, "warmup_steps": 1}, {"steps": 2, "batch_size": 4}]
    return (
        once(
            "finished_in_stages", lambda folder: run(load_recipe(recipe_file(folder, sd, pictures, stages=stages)), CPU)
        )
        / "run"
    )


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", changes, {"output": str(folder)})


def test_leaves_all_that_it_promises(finished) -> None:
    for name in (
        "recipe.yaml",
        "plan.json",
        "student/diffusion_pytorch_model.safetensors",
        "cache/cache.json",
        "stage-1/log.jsonl",
        "stage-1/sheets/step-0000000.png",
        "stage-1/sheets/step-0000002.png",
        "stage-2/unet/diffusion_pytorch_model.safetensors",
        "evaluation/evaluation.json",
        "evaluation/evaluation.md",
        "evaluation/pictures/after/0001.png",
        "pipeline/model_index.json",
        "pipeline/README.md",
        "report.html",
    ):
        assert (finished / name).is_file(), name
    assert not [p for p in finished.rglob("*") if p.name.endswith((".part", ".old"))]


def test_evaluation_tells_both_students_from_the_teacher(finished) -> None:
    result = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    assert result["distance"]["before"]["denoiser"] > 0
    assert result["distance"]["before"] != result["distance"]["after"]
    assert result["sizes"]["student"]["parameters"] < result["sizes"]["teacher"]["parameters"]
    assert result["speed"]["speeds"]["teacher"]["latency_ms"] > 0


def test_finished_steps_are_skipped(copied, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file()}
    run(recipe_of(copied), CPU)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().err.count("is done") == 8


def test_a_run_of_an_earlier_version_is_still_done() -> None:
    """The hashes of the demo's inputs; if they changed, users would have to train again."""
    found = Run(load_recipe("demo"), CPU).inputs
    assert found == {
        "plan": "bf0157873c7bde86",
        "build": "ad24aec4abc8593f",
        "cache": "6ec7ecf0e10a9a7f",
        "stage-1": "ec2d05a5c3924f15",
        "evaluate": "f24616817aad923f",
        "export": "5aba7413cc47cfee",
        "report": "995f7e85ac983eec",
    }


def test_inputs_are_the_same_in_each_process(copied) -> None:
    """The configs of most teachers' schedulers lack fields, which diffusers notes in a set's order."""
    this = Run(recipe_of(copied), CPU)
    found = []
    for noted in (["thresholding", "variance_type"], ["variance_type", "thresholding"]):
        this.teacher.noise_scheduler.register_to_config(_use_default_values=noted)
        found.append(step_inputs(this))
    assert found[0] == found[1]


def test_checkpoints_of_another_noise_schedule_are_refused(copied, sd, tmp_path) -> None:
    """Otherwise a finished stage would be written again from its checkpoint, as if it had learned the new target."""
    teacher = shutil.copytree(sd, tmp_path / "teacher")
    config = teacher / "scheduler" / "scheduler_config.json"
    recipe = recipe_of(copied, f"teacher={teacher}")
    label = read_json(copied / "stage-1" / "inputs.json")
    del label["settings"]["noise schedule"]
    write_json(copied / "stage-1" / "inputs.json", label)  # as older versions wrote it
    Run(recipe, CPU).check()
    write_json(copied / "stage-1" / "inputs.json", stage_label(Run(recipe, CPU), 1))
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    with pytest.raises(UserError, match=r"noise schedule.prediction_type epsilon, now v_prediction: set it back"):
        Run(recipe, CPU).check()


def test_changed_evaluation_repeats_only_what_depends_on_it(copied) -> None:
    this = Run(recipe_of(copied, "evaluation.steps=3"), CPU)
    todo = [step for step in this.step_names() if not this.is_done(step)]
    assert todo == ["evaluate", "export", "report"]


def test_deleted_or_cut_result_is_made_again(copied) -> None:
    this = Run(recipe_of(copied), CPU)
    weights = copied / "student" / "diffusion_pytorch_model.safetensors"
    saved = weights.read_bytes()
    for damage in (weights.unlink, lambda: weights.write_bytes(saved[:-1])):
        damage()
        assert not this.is_done("build")
        this.do("build")
        assert weights.read_bytes() == saved


def test_damaged_list_of_what_is_done_is_one_line(copied) -> None:
    for text in ("null", "[]", '{"plan": 3}', "{"):
        (copied / "steps.json").write_text(text)
        with pytest.raises(UserError, match=r"steps.json: .*: delete it and") as error:
            Run(recipe_of(copied), CPU).is_done("plan")
        assert "\n" not in str(error.value)


def test_other_recipe_in_the_same_folder_is_refused_before_anything_changes(copied) -> None:
    before = contents(copied)
    for change, words in (
        ("plan=bk-base", r"stage-1: .*trained with plan bk-small \(.*\), now bk-base .*: set it back \(`prunet run"),
        ("stages.0.ema_decay=0.5", "trained with stages.0.ema_decay 0.9999, now 0.5: set it back"),
        ("stages.0.steps=5", "stage-2: .*trained with stages.0.steps 2, now 5"),
        ("seed=5", "cache: holds a cache made with seed 1234, now 5"),
        ("data.flip=false", "made with data.flip True, now False: set it back .*, delete that folder"),
    ):
        with pytest.raises(UserError, match=words):
            run(recipe_of(copied, change), CPU)
    assert contents(copied) == before


def test_a_run_that_moved_with_its_teacher_and_data_is_still_done(copied, sd, pictures, tmp_path) -> None:
    """Its recipe has full paths; paths that no longer exist are found by their place relative to the run."""
    project = tmp_path / "project"
    for source, name in ((copied, "runs/a"), (sd, "models/sd"), (pictures, "data")):
        shutil.copytree(source, project / name)
    text = (project / "runs/a/recipe.yaml").read_text()
    for old, new in ((sd, project / "models/sd"), (pictures, project / "data")):
        text = text.replace(str(old), str(new))
    value = yaml.safe_load(text) | {"output": str(project / "runs/a")}
    (project / "runs/a/recipe.yaml").write_text(yaml.safe_dump(value))
    project.rename(tmp_path / "elsewhere")
    this = Run(recipe_of(tmp_path / "elsewhere/runs/a"), CPU)
    this.check()
    assert this.todo() == [] and this.recipe.teacher.source == str(tmp_path / "elsewhere/models/sd")
    shutil.rmtree(tmp_path / "elsewhere/models")
    with pytest.raises(UserError, match=rf"No teacher at {project}/models/sd"):
        Run(recipe_of(tmp_path / "elsewhere/runs/a"), CPU)


def test_data_that_changed_are_not_blamed_on_the_recipe(copied, pictures, tmp_path, monkeypatch) -> None:
    """The run's own recipe would be refused too, so it is not advised; a path with spaces is quoted in the advice."""
    monkeypatch.chdir(tmp_path)
    run_folder = copied.rename(tmp_path / "my run")
    shutil.copytree(pictures, tmp_path / "data")
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(pictures), "data"))
    Run(recipe_of(run_folder), CPU).check()
    with pytest.raises(UserError, match=r"seed 1234, now 5: set it back \(`prunet run '.*/my run'` resumes"):
        Run(recipe_of(run_folder, "seed=5"), CPU).check()
    (tmp_path / "data" / "000.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"files or prompts of the data \w+, now \w+: put that back as it was, delete"):
        Run(recipe_of(run_folder), CPU).check()


def test_pictures_may_go_when_the_cache_is_whole(sd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "data" / "pictures", 4)
    source = Path("data/pictures")  # without the folder this could be the name of a dataset of the hub
    recipe = load_recipe(recipe_file(tmp_path, sd, source, stages=[{"steps": 2, "batch_size": 2}]))
    run(recipe, CPU, until="cache")
    shutil.rmtree(source)
    run(recipe, CPU, until="distil")
    assert Run(recipe, CPU).is_done("stage-1")
    other = recipe.data.model_copy(update={"source": "data/others"})
    monkeypatch.setattr("prunet.runs.checks.check_source", lambda source, **_: pytest.fail(f"looks for {source}"))
    with pytest.raises(pytest.fail.Exception, match="looks for data/others"):
        Run(recipe.model_copy(update={"data": other}), CPU).check()


def test_a_fitted_student_is_made_from_the_cache(sd, pictures, tmp_path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, sd, pictures, initialisation="fitted"))
    this = Run(recipe, CPU)
    assert this.todo("build") == ["plan", "cache", "build"]
    this.finish("build")
    fitted, plain = this._unet_of("build"), inherit(this.teacher.unet, this.derived)
    assert torch.equal(fitted.conv_in.weight, plain.conv_in.weight)
    assert not torch.equal(fitted.conv_out.weight, plain.conv_out.weight)
    other = Run(recipe.model_copy(update={"seed": recipe.seed + 1}), CPU)
    assert this.is_done("build") and not other.is_done("build")


def test_disk_for_the_checkpoints_of_all_stages(sd, pictures, tmp_path, monkeypatch) -> None:
    plans = [{"plan": ["mid_block"]}, {}]
    stages = [{"steps": 5, "batch_size": 2, **plan} for plan in plans]
    this = Run(load_recipe(recipe_file(tmp_path, sd, pictures, stages=stages)), CPU)
    first, second = (16 * derived.student_size.parameters for derived in this.steps_down)
    assert first > second
    # Of 5 steps with a checkpoint after every second one two are kept, and one is written beside them.
    assert checkpoint_bytes(this, this.todo()) == 2 * first + 2 * second + first
    monkeypatch.setattr(this, "is_done", lambda step: step == "stage-1")
    assert checkpoint_bytes(this, this.todo()) == 2 * second + second


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_disk_for_paths_and_latents_is_there_before_they_are_drawn(sd, tmp_path, other_disk, monkeypatch) -> None:
    size = {"steps": 5, "batch_size": 2}
    jumps = {**size, "objective": "trajectory", "guidance_scale": 2, "jumps": 2, "path_steps": 4}
    data = {"prompts": ["a", "b", "c"], "limit": 2, "images_per_prompt": 2, "steps": 1}
    values = {"stages": [size, jumps, {**jumps, "jumps": 1}], "data": data}

    def opened(cache: Path) -> Run:
        return Run(load_recipe(recipe_file(tmp_path, sd, tmp_path, **values, cache=str(cache))), CPU)

    def check(this: Run, here: int, there: int = 0) -> None:
        """With so many bytes free on the disk of the run, and on the other one."""
        free = {tmp_path.stat().st_dev: here, other_disk.stat().st_dev: there}
        with monkeypatch.context() as patch:
            usage = lambda place: SimpleNamespace(free=free[place.stat().st_dev])  # noqa: E731
            patch.setattr("prunet.runs.disk.shutil.disk_usage", usage)
            check_disk(this, this.todo())

    this = opened(tmp_path / "cache")
    checkpoints, paths = checkpoint_bytes(this, this.todo()), path_bytes(this, 4)
    assert known_samples(this) == 4 and paths  # both stages learn from the same paths
    caches = 4 * sum(cache_bytes(this).values()) + paths + 2 * SLACK
    check(this, checkpoints + caches)
    both = r"^output: no room for checkpoints of .*B, latents of .*B, paths of .*B on .* set a lower stages\.1\.paths"
    with pytest.raises(UserError, match=both):
        check(this, checkpoints + caches - 1)
    apart = opened(other_disk / "cache")
    check(apart, checkpoints, caches)
    with pytest.raises(UserError, match=r"^cache: no room for latents of .*, or give a cache on another disk$"):
        check(apart, checkpoints, caches - 1)
    with pytest.raises(UserError, match=r"^output: no room for checkpoints of [^,]*B on .*, or give an output on"):
        check(apart, checkpoints - 1, caches)
    apart.finish("cache")
    (apart.folder / "steps.json").unlink()
    check(opened(other_disk / "cache"), checkpoints, 0)  # a finished cache needs nothing more


def test_a_vae_that_leaves_its_channels_out_has_four(sd, pictures, tmp_path) -> None:
    """As diffusers takes it."""
    folder = shutil.copytree(sd, tmp_path / "teacher")
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config.pop("latent_channels") == 4
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    this = Run(load_recipe(recipe_file(tmp_path, folder, pictures)), CPU)
    this.check()
    assert cache_bytes(this) == cache_bytes(Run(load_recipe(recipe_file(tmp_path, sd, pictures)), CPU))


def test_a_stage_that_was_stopped_took_all_of_its_steps(sd, pictures, tmp_path) -> None:
    this = Run(load_recipe(recipe_file(tmp_path, sd, pictures)), CPU)  # 4 pictures a step
    (this.folder / "stage-1").mkdir(parents=True)
    rows = [{"step": 10, "images_per_s": 2.0}, {"step": 15, "images_per_s": 0.5}]
    (this.folder / "stage-1" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert logged_seconds(this, "stage-1") == 10 * 4 / 2 + 5 * 4 / 0.5
    assert logged_seconds(this, "stage-2") == logged_seconds(this, "build") == 0


def test_finished_run_is_exported_without_its_cache(copied) -> None:
    card = copied / "pipeline" / "README.md"
    assert f"{len(Cache.open(copied / 'cache'))} samples at 16 px" in card.read_text()
    for name in ("cache", "pipeline"):
        shutil.rmtree(copied / name)
    Run(recipe_of(copied), CPU).do("export")
    assert "at 16 px" in card.read_text() and "samples at" not in card.read_text()


def test_stages_do_not_repeat_each_others_noise(finished) -> None:
    rows = [(finished / f"stage-{n}" / "log.jsonl").read_text().splitlines() for n in (1, 2)]
    assert json.loads(rows[0][0])["task"] != pytest.approx(json.loads(rows[1][0])["task"], rel=1e-3)


def test_nothing_starts_when_something_is_wrong(sd, pictures, tmp_path) -> None:
    for changes in (
        {"plan": ["down_blocks.9"]},
        {"data": {"source": str(tmp_path / "none")}},
        {"data": {"source": str(pictures), "size": 24}},
        {"evaluation": {"prompts": str(tmp_path / "none.txt")}},
        {"evaluation": {"prompts": ["a"], "sampler": "best"}},
        {"teacher": str(tmp_path / "none")},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(UserError):
            run(load_recipe(recipe_file(folder, sd, pictures, **changes)), CPU)
        assert not (folder / "run" / "plan.json").exists()


def test_sdxl_from_prompts_alone(sdxl, tmp_path) -> None:
    """The trained student is the same in every form: evaluated, as stock folder, in half precision, as one file."""
    recipe = recipe_file(
        tmp_path,
        sdxl,
        tmp_path,
        plan="vega",
        data={"prompts": ["a", "b", "c", "d"], "steps": 2},
        stages=[{"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0}],
        evaluation={"prompts": ["a cat"], "steps": 2, "guidance_scale": 2.0, "sampler": "ddim"},
        export={"single_file": True, "fp16": True},
    )
    folder = run(load_recipe(recipe), CPU)
    assert len(Cache.open(folder / "cache")) == 4
    weights = "diffusion_pytorch_model.safetensors"
    start, trained = (load_file(folder / name / weights) for name in ("student", "stage-1/unet"))
    assert start.keys() == trained.keys()
    assert all(not torch.equal(start[name], tensor) for name, tensor in trained.items() if name.endswith("weight"))

    stock = DiffusionPipeline.from_pretrained(folder / "pipeline")
    exported = stock.unet.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())
    half = load_file(folder / "pipeline/unet/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in trained.items())
    single = Teacher(folder / "student.safetensors").unet.state_dict()
    assert all(torch.equal(single[name], tensor.half().float()) for name, tensor in trained.items())
    stock.scheduler = DDIMScheduler.from_pretrained(sdxl / "scheduler", clip_sample=False)
    seed = json.loads((folder / "evaluation" / "evaluation.json").read_text())["protocol"]["seed"]
    rng = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, "output_type": "np"}
    (drawn,) = stock("a cat", generator=rng, **options).images
    shown = np.asarray(Image.open(folder / "evaluation/pictures/after/0000.png"))
    assert np.abs(shown - 255 * drawn).max() <= 1.5


STAIR = {"steps": 1, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-3, "ema_decay": None}
STAIRS = [
    {**STAIR, "plan": "bk-base"},
    {**STAIR, "plan": "bk-small", "losses": {"level": "layer"}, "learning_rate": 1e-9},
    STAIR,
]


def test_progressive_stages_cut_what_the_stage_before_trained(sd, pictures, tmp_path) -> None:
    """Three removals; stopped between all stages and resumed, it ends in the same bits."""
    changes = {"plan": "bk-tiny", "stages": STAIRS, "sheet": {"every": 0}}
    whole = run(load_recipe(recipe_file(tmp_path / "whole", sd, pictures, **changes)), CPU, until="distil")
    configs = [json.loads((whole / f"stage-{n}/unet/config.json").read_text()) for n in (1, 2, 3)]
    assert [bool(config["mid_block_type"]) for config in configs] == [True, False, False]
    assert [len(config["down_block_types"]) for config in configs] == [4, 4, 3]
    assert json.loads((whole / "plan.json").read_text())["plan"]["name"] == "bk-tiny"
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, first, second = (
        load_file(f / weights)["conv_in.weight"] for f in (sd, whole / "stage-1", whole / "stage-2")
    )
    assert (first - before).abs().min() > 1e-4 and (second - first).abs().max() < 1e-7

    recipe = load_recipe(recipe_file(tmp_path / "parts", sd, pictures, **changes))
    first, second = Run(recipe, CPU), Run(recipe, CPU)
    for step in ("plan", "build", "cache", "stage-1"):
        first.do(step)
    second.do("stage-2")
    assert not (tmp_path / "parts/run/stage-3/checkpoints").exists()
    parts = run(recipe, CPU, until="distil")
    assert contents(parts) == contents(whole)


def test_stage_that_brings_a_part_back_is_refused(sdxl, pictures, tmp_path) -> None:
    stages = [{"steps": 1, "plan": "vega"}, {"steps": 1}]
    with pytest.raises(UserError, match="remove it in the later plan too"):
        Run(load_recipe(recipe_file(tmp_path, sdxl, pictures, plan="ssd-1b", stages=stages)), CPU).check()
    with pytest.raises(UserError, match="last stage must train the recipe's own plan"):
        load_recipe(recipe_file(tmp_path, sdxl, pictures, plan="ssd-1b", stages=stages[:1]))


def test_teachers_in_turn(sd, pictures, tmp_path) -> None:
    """The second teacher has another U-Net and text encoder, so it needs its own cache, and its parts are exported."""
    second = make_pipeline(tmp_path / "second", "sd", seed=3)
    for part in ("vae", "tokenizer"):
        shutil.rmtree(second / part)
        shutil.copytree(sd / part, second / part)
    stage = {"steps": 1, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-3}
    stages = [stage, {**stage, "teacher": str(second)}]
    folder = run(load_recipe(recipe_file(tmp_path, sd, pictures, stages=stages)), CPU, until="export")
    exported, expected = (
        Teacher(path).text_part("text_encoder").state_dict() for path in (folder / "pipeline", second)
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    alone = run(load_recipe(recipe_file(tmp_path / "alone", sd, pictures, stages=[stage, stage])), CPU, until="distil")
    assert contents(folder / "stage-1") == contents(alone / "stage-1")
    assert contents(folder / "stage-2/unet") != contents(alone / "stage-2/unet")
    assert (folder / "cache-2/cache.json").is_file()
    assert not (alone / "cache-2").exists()


def test_teacher_of_another_layout_or_latent_space_is_refused(sd, sdxl, pictures, tmp_path) -> None:
    stages = [{"steps": 1}, {"steps": 1, "teacher": str(sdxl)}]
    with pytest.raises(UserError, match="its U-Net is not that of"):
        Run(load_recipe(recipe_file(tmp_path, sd, pictures, stages=stages)), CPU).check()
    stages[1]["teacher"] = str(make_pipeline(tmp_path / "v", "sd", prediction_type="v_prediction"))
    with pytest.raises(UserError, match="noise schedule is not that of"):
        Run(load_recipe(recipe_file(tmp_path, sd, pictures, stages=stages)), CPU).check()


def test_a_single_file_that_cannot_be_is_refused_before_the_training(sd, pictures, tmp_path, monkeypatch) -> None:
    this = Run(load_recipe(recipe_file(tmp_path, sd, pictures, export={"single_file": True})), CPU)
    this.check()
    monkeypatch.setattr("prunet.teacher.ldm._VAE_INSIDE", {})  # as if it had a module without a name in the layout
    with pytest.raises(UserError, match=r"^export\.single_file: LDM has no place for .*: set it to false$"):
        this.check()
    this.check("distil")


WAIT_FOR = {
    "cache": "run/cache/shard-00001.safetensors",
    "distil": "run/stage-1/checkpoints/step-0000006",
    "export": "run/.pipeline.part",
}


@pytest.mark.processes
def test_killed_three_times_ends_in_the_same_files(tmp_path, pictures) -> None:
    """A real process, killed with SIGKILL in the cache, while distilling and while exporting."""
    teacher = make_pipeline(tmp_path / "teacher", "sd")
    stages = [{"steps": 12, "batch_size": 4, "warmup_steps": 1}]
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from prunet import load_recipe, run, Runtime\nfrom prunet.data import encoding as latents\n"
        "latents.BLOCK = 2\n"
        "run(load_recipe(sys.argv[1]), Runtime(device='cpu', precision='no', log_every=1))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(recipe: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, str(recipe)], env=env, stderr=subprocess.DEVNULL)

    whole = recipe_file(tmp_path / "whole", teacher, pictures, stages=stages)
    parts = recipe_file(tmp_path / "parts", teacher, pictures, stages=stages)
    assert start(whole).wait(300) == 0
    killed = 0
    for target in WAIT_FOR.values():
        process, path = start(parts), tmp_path / "parts" / target
        while process.poll() is None and not path.exists():
            time.sleep(0.002)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed >= 2, "the kills came too late to mean anything"
    assert start(parts).wait(300) == 0
    assert contents(tmp_path / "parts" / "run") == contents(tmp_path / "whole" / "run")


def test_a_stage_that_cannot_resume_is_refused_before_what_is_done_is_undone(copied) -> None:
    before = {p: p.read_bytes() for p in (copied / "recipe.yaml", copied / "steps.json")}
    for change, message in (
        ("stages.1.steps=1", "already past steps 1"),
        ("stages.1.learning_rate=0.5", "is finished"),
    ):
        with pytest.raises(UserError, match=message):
            Run(recipe_of(copied, change), CPU).check()
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_that_was_evaluated_before_image_to_image_stays_finished(finished: Path) -> None:
    """Its recipe.yaml lacks the key: the default keeps the evaluation finished, another value does not."""
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["evaluation"].pop("image_to_image") == 4
    done = json.loads((finished / "steps.json").read_text())
    for changes, same in (({}, True), ({"image_to_image": 4}, True), ({"image_to_image": 0}, False)):
        value = recipe | {"evaluation": recipe["evaluation"] | changes}
        inputs = Run(Recipe.model_validate(value), CPU).inputs
        assert (inputs["evaluate"] == done["evaluate"]["inputs"]) is same
        assert inputs["stage-1"] == done["stage-1"]["inputs"]
    # All inputs that were hashed before this key existed.
    how = {key: recipe["evaluation"][key] for key in ("steps", "guidance_scale", "sampler")}
    assert _hash(done["stage-2"]["inputs"], ["a cat", "a dog"], how, 1234, 16) == done["evaluate"]["inputs"]
