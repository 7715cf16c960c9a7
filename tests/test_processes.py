"""Several processes give the results of one: the same cache, the same losses, the same student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_pipeline
from safetensors.torch import load_file
from test_cli import call

from prunet.training.fsdp import local, piece, whole

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_recipe(folder: Path, teacher: Path, pictures: Path, **stage: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    value = {
        "teacher": str(teacher),
        "plan": "bk-small",
        "data": {"source": str(pictures)},
        "stages": [{"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9, **stage}],
        "evaluation": {"prompts": ["a cat", "a dog", "a red square", "two", "three"], "steps": 2},
        "sheet": {"every": 3},
        "checkpoint_every": 2,
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(value))
    return folder / "recipe.yaml"


def command(processes: int, *arguments: str) -> list[str]:
    script = Path(__file__).parent / "run_prunet.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = ["--device", "cpu", "--precision", "no", "--micro-batch", "2"]
    return [sys.executable, *(launch if processes > 1 else []), str(script), *arguments, *options]


def do(processes: int, *arguments: str) -> None:
    done = subprocess.run(command(processes, *arguments), env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stage-1" / "log.jsonl").read_text().splitlines()]


def assert_trained_the_same(one: Path, other: Path) -> None:
    """Asserts equal caches, losses within 1e-5, and students equal up to the rounding of so many steps."""
    for file in sorted(one.glob("cache*/[!.]*")):  # except the mark and the lock, which contain times
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes(), file
    ours, theirs = rows(one), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [2, 3, 4, 6]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() - {"images_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
    a, b = (load_file(run / "stage-1" / "unet" / "diffusion_pytorch_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4, msg=name)


def assert_same(one: Path, other: Path) -> None:
    """The same with equal evaluations."""
    assert_trained_the_same(one, other)
    before, after = (json.loads((run / "evaluation" / "evaluation.json").read_text()) for run in (one, other))
    assert before["distance"]["before"] == after["distance"]["before"]
    assert before["distance"]["after"]["denoiser"] == pytest.approx(after["distance"]["after"]["denoiser"], rel=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher with the scheduler of Stable Diffusion v1.4, whose config lacks many of DDPM's fields."""
    folder = make_pipeline(tmp_path_factory.mktemp("processes") / "teacher", "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    schedule = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


@pytest.fixture(scope="module")
def alone(teacher: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("alone"), teacher, pictures)
    do(1, "run", str(recipe))
    return recipe.parent / "run"


@pytest.mark.processes
def test_two_processes_equal_one(alone: Path, teacher: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, teacher, pictures)
    do(2, "run", str(recipe))
    assert_same(alone, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.processes
def test_two_processes_draw_the_same_paths_and_learn_the_same_jumps(teacher, pictures, tmp_path) -> None:
    few_steps = {"objective": "trajectory", "guidance_scale": 2, "jumps": 2, "path_steps": 4}
    for processes in (1, 2):
        do(processes, "distil", str(write_recipe(tmp_path / str(processes), teacher, pictures, **few_steps)))
    one, two = (tmp_path / str(processes) / "run" for processes in (1, 2))
    assert len(list(one.glob("cache-paths/shard-*"))) > 1  # so that both have some
    assert_trained_the_same(one, two)


@pytest.mark.processes
def test_alone_then_sharded_then_alone_equals_one(alone: Path, teacher: Path, pictures: Path, tmp_path: Path) -> None:
    """A checkpoint does not depend on the number of processes, nor on sharding (FSDP2)."""
    recipe = write_recipe(tmp_path, teacher, pictures)
    do(1, "distil", str(recipe), "--set", "stages.0.steps=2")
    do(2, "distil", str(recipe), "--set", "stages.0.steps=4", "--fsdp")
    do(1, "run", str(recipe))
    assert_same(alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plans"], "plans: runs in one process"),
        (
            ["run", "recipe.yaml", "--device", "cpu", "--precision", "fp16", "--fsdp"],
            "--fsdp: works only with --precision bf16",
        ),
    ],
)
def test_options_for_one_process_are_refused_in_several(arguments, message, capsys, monkeypatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    code, _, said = call(capsys, *arguments)
    assert code == 2
    assert said.startswith("error (process 1): ") and message in said and len(said.splitlines()) == 1


def test_sharding_leaves_plain_tensors_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    assert local(weight) is weight and whole(weight) is weight and piece(weight.data, weight).equal(weight)
