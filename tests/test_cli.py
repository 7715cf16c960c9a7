"""The command line as a user meets it: help, JSON, and one line for each mistake."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_pictures
from safetensors.torch import load_file, save_file

from prunet import Teacher, UserError, build, derive, load_plan
from prunet.cli import main
from prunet.exports.single_file import export_single_file
from prunet.play.models import open_players
from prunet.speed.models import drawings


def call(capsys, *args: object) -> tuple[int, str, str]:
    """Runs `prunet ARGS` in this process: exit code, stdout, stderr."""
    argv, sys.argv = sys.argv, ["prunet", *map(str, args)]
    try:
        main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return int(code or 0), out, err


def recipe(folder: Path, teacher: object, source: object, **changes) -> Path:
    value = {
        "teacher": teacher if isinstance(teacher, dict) else str(teacher),
        "plan": "bk-small",
        "data": {"source": str(source)},
        "stages": [{"steps": 2, "batch_size": 2}],
        "evaluation": {"prompts": ["a"], "steps": 1},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value | changes))
    return path


def test_inspect_json_has_the_facts(capsys) -> None:
    code, out, _ = call(capsys, "inspect", "sd-v1", "--plan", "bk-tiny", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0
    assert facts["parameters"] == {"teacher": 859_520_964, "student": 323_384_964}
    assert {"macs", "student_config", "pairs", "weight_map", "loads_in"} <= facts.keys()


def test_inspect_of_a_published_plan_says_what_is_computed(capsys, monkeypatch) -> None:
    found = {plan: call(capsys, "inspect", "sd-v1", "--plan", plan) for plan in ("bk-tiny", "none")}
    monkeypatch.setattr("prunet.plan.effect.shipped_effect", lambda *_: None)
    assert found == {plan: call(capsys, "inspect", "sd-v1", "--plan", plan) for plan in ("bk-tiny", "none")}
    assert [code for code, *_ in found.values()] == [0, 0] and "323,384,964" in found["bk-tiny"][1]


@pytest.mark.processes
def test_inspect_of_a_published_plan_needs_no_torch() -> None:
    program = "import sys; from prunet.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "inspect", "sd-v1", "--plan", "bk-tiny"], capture_output=True)
    assert done.returncode == 0 and b"323,384,964" in done.stdout, done.stderr


def test_inspect_takes_device_options_only_with_sensitivity(capsys) -> None:
    code, _, err = call(capsys, "inspect", "sd-v1", "--device", "cpu")
    assert code == 2 and "--device" in err and "--sensitivity" in err


def test_inspect_of_a_recipe_shows_its_stages(capsys, tmp_path) -> None:
    path = recipe(tmp_path, "sd-v1", tmp_path, stages=[{"steps": 5, "plan": "bk-base"}, {"steps": 7}])
    code, out, _ = call(capsys, "inspect", path)
    assert code == 0
    for count in (859_520_964, 579_384_964, 482_346_884):
        assert f"{count:,}" in out
    text = " ".join(out.split())
    assert "1 removes down_blocks.0: 1 attention, 1 resnet; down_blocks.1" in text and "2 removes mid_block" in text


def test_inspect_of_a_recipe_lists_its_stages_as_json(capsys, sd, tmp_path) -> None:
    stages = [{"steps": 5, "plan": "bk-base"}, {"steps": 7}]
    code, out, _ = call(capsys, "inspect", recipe(tmp_path, sd, tmp_path, plan="bk-small", stages=stages), "--json")
    config = Teacher(sd).unet_config
    sizes = [derive(config, load_plan(name)).student_size.parameters for name in ("bk-base", "bk-small")]
    assert code == 0 and sizes[0] > sizes[1]
    assert [stage["parameters"]["student"] for stage in json.loads(out)["stages"]] == sizes
    path = recipe(tmp_path, sd, tmp_path, plan="bk-base", stages=[{"steps": 5, "plan": "bk-small"}, {"steps": 5}])
    code, _, err = call(capsys, "inspect", path)
    assert code == 2
    assert "remove it in the later plan too" in err


def test_inspect_draws_removed_parts_in_lower_case(capsys) -> None:
    code, out, _ = call(capsys, "inspect", "sd-v1", "--plan", "bk-small")
    assert code == 0
    assert "down_blocks.0 " in out
    assert "R A r a" in out
    assert "(mid_block)" in out
    assert "482,346,884" in out


def test_a_terminal_without_utf8_shows_escapes(monkeypatch, sd) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["prunet", "inspect", str(sd), "--plan", "bk-small"])
    with pytest.raises(SystemExit) as done:
        main()
    sys.stdout.flush()
    assert not done.value.code and rb"\u2193" in shown.getvalue(), "the arrow of a downsampler"


def test_inspect_reads_no_weight(capsys, sd, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    assert call(capsys, "inspect", folder, "--plan", "bk-small")[0] == 0


def test_a_single_file_has_the_precision_of_the_recipe(run_folder, tmp_path, capsys) -> None:
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    recipe["export"]["fp16"] = True
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for given, dtype in (((), torch.float16), (("--no-fp16",), torch.float32)):
        file = tmp_path / f"{len(given)}.safetensors"
        assert call(capsys, "export", run_folder, "--single-file", *given, "-o", file)[0] == 0
        assert load_file(file)["model.diffusion_model.out.2.weight"].dtype == dtype


def test_verbs_in_a_row(capsys, sd, pictures, tmp_path, monkeypatch) -> None:
    path = recipe(tmp_path, sd, pictures)
    flags = ("--device", "cpu", "--precision", "no", "--json")
    code, out, _ = call(capsys, "estimate", path, *flags)
    cost = json.loads(out.splitlines()[-1])
    assert code == 0
    assert cost["images"] == 4
    assert (cost["samples"], cost["or_more"]) == (len(list(pictures.glob("*.png"))), False)
    teacher = Teacher(sd).unet
    student = build(Teacher(sd), load_plan("bk-small"))
    weights = [4 * sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
    assert [cost["memory_bytes"][part] for part in ("teacher", "student", "gradients")] == [*weights, weights[1]]
    assert cost["memory_bytes"]["total"] > weights[0] + 5 * weights[1]  # with two moments, an average and activations
    assert cost["distil_hours"] == pytest.approx(cost["seconds_per_image"] * 4 / 3600)
    assert set(cost["steps"].values()) == {"to do"} and not (tmp_path / "run").exists()
    monkeypatch.setattr("prunet.runs.estimate.step_memory", lambda *args, **given: 1000)  # it was computed once
    code, out, _ = call(capsys, "estimate", path, "--set", "data.limit=2", "--set", "data.size=32", *flags[:-1])
    assert "2, each seen 2.0 times; 32 px, not the 16 px that the teacher was trained on" in " ".join(out.split())
    for verb in ("cache", "distil", "evaluate", "run"):
        code, out, _ = call(capsys, verb, path, *flags)
        assert code == 0, verb
        assert json.loads(out.splitlines()[-1])["output"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    code, out, _ = call(capsys, "export", tmp_path / "run", "--single-file", "-o", tmp_path / "s.safetensors", "--json")
    assert (code, json.loads(out.splitlines()[-1])["output"]) == (0, str(tmp_path / "s.safetensors"))
    code, out, err = call(
        capsys, "generate", tmp_path / "run", "a cat " * 60, "-n", 2, "--steps", 1, "-o", tmp_path / "g", *flags
    )
    assert [Path(p).is_file() for p in json.loads(out.splitlines()[-1])["pictures"]] == [True, True]
    assert " ".join(err.split()).count("... is cut: it is longer than the text encoder reads") == 1
    (tmp_path / "run").rename(tmp_path / "moved")  # a run folder resumes in its new place
    code, out, _ = call(capsys, "run", tmp_path / "moved", *flags)
    assert json.loads(out.splitlines()[-1])["output"] == str(tmp_path / "moved")
    assert not (tmp_path / "run").exists()
    code, out, _ = call(capsys, "build", sd, "--plan", "bk-tiny", "-o", tmp_path / "tiny", "--json")
    assert (tmp_path / "tiny" / "config.json").is_file()


@pytest.fixture
def bad(tmp_path, sd, pictures):
    """Files and folders that are not what they should be."""
    made = tmp_path / "bad"
    made.mkdir()
    (made / "model.ckpt").write_bytes(b"pickle")
    (made / "empty.safetensors").write_bytes(b"")
    (made / "text.txt").write_text("hello")
    save_file({"a": torch.zeros(1)}, made / "other.safetensors")
    (made / "no-index").mkdir()
    broken = shutil.copytree(sd, made / "broken-weights")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    pickled = shutil.copytree(sd, made / "pickled")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet/diffusion_pytorch_model.bin")
    flux = shutil.copytree(sd, made / "flux")
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    garbled = shutil.copytree(sd, made / "garbled")
    (garbled / "unet" / "config.json").write_text("{")
    make_pictures(made / "pictures", 2)
    for text in (made / "pictures").glob("*.txt"):
        text.unlink()
    (made / "list.yaml").write_text("- a\n")
    (made / "plan.yaml").write_text("remove: [up_blocks.0]\n")
    clip = {"model": "x", "source": "There."}
    protocol = {"name": "x", "prompts": {"source": "Here.", "file": "text.txt"}, "metrics": ["kid"], "features": "clip"}
    protocol |= {"clip": clip, "real": {"source": "There."}, "kid_subset_size": 10}
    (made / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    return made


def mistakes(bad: Path, sd: Path, pictures: Path, tmp_path: Path) -> dict[str, tuple]:
    def with_recipe(name: str, verb: str = "run", teacher: object = sd, source: object = pictures, **changes) -> tuple:
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        return (verb, recipe(folder, teacher, source, **changes), "--device", "cpu", "--precision", "no")

    def measure(*options: object, protocol: object = bad / "protocol.yaml") -> tuple:
        return ("measure", sd, "--protocol", protocol, "-o", tmp_path / "measured", "--device", "cpu", *options)

    return {
        "no such verb": ("inspekt",),
        "no such protocol": measure(protocol="coco"),
        "protocol that is none": measure(protocol=bad / "plan.yaml"),
        "prompts that are not there": measure(protocol="parti"),
        "prompts of something else": measure("--prompts", bad / "text.txt", protocol="parti"),
        "no real pictures": measure(),
        "real pictures that are not there": measure("--real", bad / "nowhere"),
        "real pictures that are none": measure("--real", bad / "no-index"),
        "real pictures that are text": measure("--real", bad / "text.txt"),
        "features that are none": measure("--real", bad / "other.safetensors"),
        "no weights": measure("--real", bad / "pictures"),
        "measuring to nowhere": ("measure", sd, "--protocol", bad / "protocol.yaml"),
        "weights without a name": measure("--weights", bad),
        "weights of an unknown network": measure("--real", bad / "pictures", "--weights", "vgg=x"),
        "weights that are not there": measure("--real", bad / "pictures", "--weights", f"clip={bad / 'nowhere'}"),
        "measuring of cut weights": ("measure", bad / "broken-weights", *measure("--real", bad / "pictures")[2:]),
        "evaluation with weights of nothing": (*with_recipe("lpips", "evaluate"), "--weights", "vgg"),
        "evaluation with strange weights": (*with_recipe("lpips of clip", "evaluate"), "--weights", "clip=x"),
        "evaluation with half the weights": (*with_recipe("half of lpips", "evaluate"), "--weights", "vgg=x"),
        "evaluation with weights that are not there": (
            *with_recipe("no lpips", "evaluate"),
            *("--weights", f"vgg={bad / 'text.txt'}", "--weights", f"lpips={bad / 'none.pth'}"),
        ),
        "measuring with endless guidance": measure("--guidance-scale", "inf"),
        "comparison of one": ("compare", bad),
        "comparison of what was not measured": ("compare", bad, tmp_path),
        "comparison that is no page": ("compare", bad, tmp_path, "-o", bad / "text.txt"),
        "no ablation": ("ablate", bad / "none.yaml"),
        "ablation that is a list": ("ablate", bad / "list.yaml"),
        "ablation that is none": ("ablate", bad / "plan.yaml"),
        "no such option": ("inspect", "sd-v1", "--plans", "bk-tiny"),
        "no argument": ("inspect",),
        "no such teacher": ("inspect", bad / "nowhere"),
        "pickle": ("inspect", bad / "model.ckpt"),
        "empty file": ("inspect", bad / "empty.safetensors"),
        "text file": ("inspect", bad / "text.txt"),
        "other tensors": ("inspect", bad / "other.safetensors"),
        "folder without an index": ("inspect", bad / "no-index"),
        "other pipeline": ("inspect", bad / "flux"),
        "garbled config": ("inspect", bad / "garbled"),
        "config of a folder": ("inspect", sd, "--config", sd),
        "config of a layout": ("inspect", "sd-v1", "--config", sd),
        "config for a student of a folder": ("build", sd, "--plan", "bk-tiny", "-o", tmp_path / "o", "--config", sd),
        "config of a folder that draws": ("generate", sd, "a", "--config", bad / "nowhere"),
        "config of a folder that is measured": measure("--real", bad / "pictures", "--config", sd),
        "config of a folder in a recipe": with_recipe("config", teacher={"source": str(sd), "config": str(sd)}),
        "config of a recipe": (*with_recipe("config of a recipe", "inspect")[:2], "--config", sd),
        "plan of a recipe": (*with_recipe("plan of a recipe", "inspect")[:2], "--plan", "bk-tiny"),
        "no such plan": ("inspect", "sd-v1", "--plan", "bk-tny"),
        "plan that matches nothing": ("inspect", "sdxl", "--plan", "bk-tiny"),
        "uneven plan": ("inspect", "sd-v1", "--plan", bad / "plan.yaml"),
        "plan that is no plan": ("inspect", "sd-v1", "--plan", bad / "text.txt"),
        "layout without weights": ("build", "sd-v1", "--plan", "bk-tiny", "-o", tmp_path / "o"),
        "cut weights": ("build", bad / "broken-weights", "--plan", "bk-tiny", "-o", tmp_path / "o"),
        "pickled weights": ("build", bad / "pickled", "--plan", "bk-tiny", "-o", tmp_path / "o"),
        "output that is something else": ("build", sd, "--plan", "bk-tiny", "-o", bad),
        "no recipe": ("run", bad / "none.yaml"),
        "recipe that is a list": ("run", bad / "list.yaml"),
        "folder that is no run": ("run", bad),
        "unknown key": with_recipe("unknown key", stage=[]),
        "no pictures": with_recipe("no pictures", source=bad / "nowhere"),
        "pictures without captions": with_recipe("pictures without captions", source=bad / "pictures"),
        "no shards": with_recipe("no shards", source=bad / "train-*.tar"),
        "size": with_recipe("size", data={"source": str(pictures), "size": 24}),
        "prompt file": with_recipe("prompt file", evaluation={"prompts": str(bad / "none.txt")}),
        "sampler": with_recipe("sampler", evaluation={"prompts": ["a"], "sampler": "best"}),
        "output is a file": with_recipe("output is a file", output=str(bad / "text.txt")),
        "run of cut weights": with_recipe("run of cut weights", teacher=bad / "broken-weights"),
        "set": (*with_recipe("set"), "--set", "stages.0.step=3"),
        "set without a value": (*with_recipe("set without a value"), "--set", "stages"),
        "no such month": (*with_recipe("month"), "--set", "data.limit=2001-13-45"),
        "no number": (*with_recipe("number"), "--set", "data.limit=!!int abc"),
        "brackets without end": (*with_recipe("brackets"), "--set", "data.limit=" + "[" * 5000),
        "no digit": (*with_recipe("digit"), "--set", "stages.².steps=3"),
        "null character": (*with_recipe("null"), "--set", r'output="a\0b"'),
        "batch of everything": (*with_recipe("everything"), "--set", "stages.0.batch_size=100000000000"),
        "cache is a file": (*with_recipe("cache"), "--set", f"cache={bad / 'text.txt'}"),
        "micro-batch": (*with_recipe("micro-batch"), "--micro-batch", 3),
        "micro-batch of 0": (*with_recipe("micro-batch of 0"), "--micro-batch", 0),
        "precision": ("run", bad / "none.yaml", "--precision", "fp8"),
        "device": ("generate", sd, "a", "--device", "cuda:7"),
        "tracker": (*with_recipe("tracker"), "--tracker", "nothing"),
        "device that computes nothing": ("bench", sd, "--device", "meta"),
        "generate without a model": ("generate", bad / "nowhere", "a"),
        "generate sampler": ("generate", sd, "a", "--sampler", "best"),
        "generate what is no text": ("generate", sd, "a\udcff"),
        "generate a book": ("generate", sd, "a " * 6000),
        "generate size": ("generate", sd, "a", "--size", 24),
        "bench of no model": ("bench", bad / "nowhere"),
        "bench of one model twice": ("bench", sd, sd),
        "bench of cut weights": ("bench", sd, bad / "broken-weights", "--device", "cpu"),
        "bench size": ("bench", sd, "--size", 24, "--device", "cpu"),
        "bench of a wall": ("bench", sd, "--size", 6_400_000, "--device", "cpu"),
        "bench to a long name": ("bench", sd, "-o", tmp_path / ("x" * 300), "--device", "cpu"),
        "comparison of nothing": ("compare", bad / "nowhere", bad),
        "bench plan": ("bench", sd, "--plan", "bk-tny", "--device", "cpu"),
        "bench batch size": ("bench", sd, "--batch-size", 0),
        "bench of a layout": ("bench", "sd-v1", "--device", "cpu"),
        "bench into something else": ("bench", sd, "-o", bad, "--device", "cpu"),
        "bench under a file": ("bench", sd, "-o", bad / "text.txt" / "o", "--device", "cpu"),
        "several pictures in one file": ("generate", sd, "a", "-n", 2, "-o", bad / "a.png"),
        "output under a file": ("build", sd, "--plan", "bk-tiny", "-o", bad / "text.txt" / "o"),
        "pictures under a file": ("generate", sd, "a", "--steps", 1, "-o", bad / "text.txt" / "a.png"),
        "fp16 on a CPU": (*with_recipe("fp16 on a CPU")[:2], "--precision", "fp16"),
        "export of no run": ("export", bad),
        "export name": ("export", bad, "--single-file", "-o", bad / "x.ckpt"),
    }


def test_each_mistake_is_one_line_and_exit_code_2(capsys, bad, sd, pictures, tmp_path) -> None:
    tried = mistakes(bad, sd, pictures, tmp_path)
    assert len(tried) >= 30
    for name, args in tried.items():
        code, out, err = call(capsys, *args)
        lines = [line for line in err.splitlines() if not line.startswith(("→", "✓"))]
        assert (code, len(lines)) == (2, 1), f"{name}: {code}\n{err}"
        assert lines[0].startswith("error: "), name
        assert "Traceback" not in out + err


def test_a_config_that_would_not_be_used_is_refused(capsys, sd, tmp_path) -> None:
    for args in (("inspect", sd), ("generate", sd, "a"), ("build", sd, "--plan", "bk-tiny", "-o", tmp_path / "o")):
        code, _, err = call(capsys, *args, "--config", tmp_path)
        assert code == 2
        assert err.startswith(f"error: {sd}: --config (in a recipe teacher.config) is for a single .safetensors file")
    code, _, err = call(capsys, "inspect", tmp_path / "none.safetensors", "--config", sd)
    assert code == 2 and "No teacher at" in err


def test_a_config_is_for_the_files_among_several_models(sd, tmp_path) -> None:
    file = str(export_single_file(sd, tmp_path / "model.safetensors"))
    assert len(drawings([file, str(sd)], config=str(sd))) == 2
    given = {"config": str(sd), "device": "cpu", "dtype": torch.float32}
    assert [player.name for player in open_players([file, str(sd)], **given)] == ["model.safetensors", "sd"]
    with pytest.raises(UserError, match=r"--config .* is for a single \.safetensors file"):
        drawings([str(sd)], config=str(sd))


@pytest.mark.processes
def test_mistakes_of_a_real_process_have_no_traceback(bad) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "prunet", "inspect", str(bad / "model.ckpt")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "safetensors" in done.stderr


def test_without_a_verb_it_shows_its_help(capsys) -> None:
    code, out, err = call(capsys)
    assert code == 0 and "inspect" in out and not err


def test_inspect_of_a_run_shows_its_plan(capsys, finished) -> None:
    code, out, _ = call(capsys, "inspect", finished)
    assert code == 0 and "by bk-small" in out and "2 x 2" in out
    code, _, err = call(capsys, "inspect", finished, "--plan", "bk-tiny")
    assert code == 2 and "names its own plan" in err


def test_a_tilde_is_the_home_folder(capsys, sd, tmp_path, monkeypatch) -> None:
    """In each path of a recipe, and in options after `=`, where a shell does not replace it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd, tmp_path / "teacher")
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "plan.yaml").write_text("remove: [mid_block]\n")
    values = {"plan": "~/plan.yaml", "evaluation": {"prompts": "~/prompts.txt", "steps": 1}, "output": "~/out"}
    path = recipe(tmp_path, "~/teacher", "~/pictures", **values)
    assert call(capsys, "cache", "~/recipe.yaml", "--set", "cache=~/latents", "--device", "cpu")[0] == 0
    assert (tmp_path / "out" / "plan.json").is_file() and (tmp_path / "latents" / "cache.json").is_file()
    assert call(capsys, "build", "~/teacher", "--plan=~/plan.yaml", "--output=~/student")[0] == 0
    assert (tmp_path / "student" / "config.json").is_file() and not Path("~").exists() and path.is_file()


@pytest.mark.parametrize("verb", ["generate", "bench", "build"])
def test_no_folder_is_named_like_a_file(verb, capsys, sd, tmp_path) -> None:
    rest = {"generate": ("a", "--device", "cpu"), "bench": ("--device", "cpu"), "build": ("--plan", "bk-tiny")}[verb]
    code, _, err = call(capsys, verb, sd, *rest, "-o", tmp_path / "q.gif")
    assert code == 2 and "q.gif has the name of a file" in err and not (tmp_path / "q.gif").exists()


@pytest.mark.processes
def test_ctrl_c_during_imports_leaves_no_traceback() -> None:
    code = (
        "import os, signal, sys\nfrom prunet import __main__\n"
        "class Finder:\n"
        "    def find_spec(name, *rest): name == 'typer' and os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n__main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
