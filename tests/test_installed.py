"""The package as a user gets it: sdist and wheel, installed away from the clone, to a student in five commands."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.processes

BUILD = "import sys, setuptools.build_meta as build; getattr(build, sys.argv[1])(sys.argv[2])"


def run(folder: Path, *command: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, without the clone in its path."""
    left_out = ("PYTHONPATH", "PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "TQDM_DISABLE")
    env = {key: value for key, value in os.environ.items() if key not in left_out} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, so that both are whole."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "prunet", source / "prunet", ignore=shutil.ignore_patterns("__pycache__"))
    run(source, sys.executable, "-c", BUILD, "build_sdist", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder / "unpacked", filter="data")
    run(next((folder / "unpacked").iterdir()), sys.executable, "-c", BUILD, "build_wheel", folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def prunet(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in an environment that has the wheel, and what it needs from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    run(folder.parent, sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(
        folder.parent,
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    )
    (site,) = folder.glob("lib/*/site-packages")
    # A line in a .pth adds the folder, but does not read the .pth files in it: the clone is not found there.
    (site / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    found = run(folder.parent, python, "-c", "import prunet; print(prunet.__file__)").stdout
    assert Path(found.strip()).is_relative_to(folder)
    return folder / "bin" / "prunet"


def test_the_wheel_has_every_file_of_the_package(wheel) -> None:
    with zipfile.ZipFile(wheel) as built:
        names = {name for name in built.namelist() if name.startswith("prunet/")}
    ours = (path.relative_to(ROOT) for path in (ROOT / "prunet").rglob("*") if path.is_file())
    assert {str(path) for path in ours if "__pycache__" not in path.parts} == names


def test_from_an_empty_folder_to_a_student_in_five_commands(prunet, sd, pictures, tmp_path) -> None:
    shutil.copytree(sd, tmp_path / "model")
    shutil.copytree(pictures, tmp_path / "pictures")
    small = ("stages.0.steps=2", "stages.0.batch_size=2", "evaluation.limit=2", "evaluation.steps=1", "sheet.every=0")
    sets = [part for value in small for part in ("--set", value)]
    new = run(tmp_path, prunet, "new", "--teacher", "model", "--data", "pictures", "--device", "cpu")
    (tmp_path / "mine.yaml").write_text(new.stdout)
    commands = (
        ("inspect", "mine.yaml"),
        ("run", "mine.yaml", "--device", "cpu", *sets),
        ("generate", "runs/model-bk-small", "a cat", "--steps", 1, "-o", "cat.png", "--device", "cpu"),
        ("export", "runs/model-bk-small", "--single-file"),
    )
    said = [new, *(run(tmp_path, prunet, *command) for command in commands)]
    foreign = [line for done in said for line in done.stderr.splitlines() if "warn" in line.lower()]
    assert not foreign and (tmp_path / "cat.png").is_file()
    student = DiffusionPipeline.from_pretrained(tmp_path / "runs" / "model-bk-small" / "pipeline").unet
    single = load_file(tmp_path / "runs" / "model-bk-small" / "student.safetensors")
    assert student.config["layers_per_block"] == 1  # bk-small's
    exported = single["model.diffusion_model.input_blocks.0.0.weight"]  # in the precision of the recipe's `export.fp16`
    assert exported.dtype == torch.float16 and torch.equal(exported, student.conv_in.weight.half())
    assert "model-bk-small" in run(tmp_path, prunet, "list").stdout


def test_the_demo_says_that_it_needs_a_clone(prunet, tmp_path) -> None:
    assert "git clone" in run(tmp_path, prunet, "run", "demo", ok=False).stderr
