"""Files of other users: a file without permission is reported as such, and a read-only run can be read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cli import call

NOBODY = 65534
WEIGHTS = "diffusion_pytorch_model.safetensors"


@contextmanager
def another_user() -> Iterator[None]:
    """A user without rights of its own: tests in a container run as root, who may read and write everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared(finished: Path, sd: Path, pictures: Path) -> Iterator[Path]:
    """A folder that every user reaches, unlike pytest's, with a run, a copy of it, its teacher and its pictures."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    shutil.copytree(sd, folder / "teacher")
    shutil.copytree(pictures, folder / "pictures")
    for name in ("run", "again"):
        recipe = Path(shutil.copytree(finished, folder / name)) / "recipe.yaml"
        text = recipe.read_text().replace(str(sd), str(folder / "teacher"))
        recipe.write_text(text.replace(str(pictures), str(folder / "pictures")))
    yield folder
    shutil.rmtree(folder)


#: A file -> the command that reads it.
UNREADABLE = {
    f"teacher/unet/{WEIGHTS}": ("inspect", "teacher", "--plan", "bk-tiny"),
    f"teacher/vae/{WEIGHTS}": ("estimate", "run"),
    "teacher/text_encoder/model.safetensors": ("generate", "teacher", "a", "-o", "a.png"),
    "teacher/unet/config.json": ("inspect", "teacher"),
    "run/recipe.yaml": ("run", "run"),
    "again/recipe.yaml": ("compare", "run", "again", "-o", "page.html"),
    "run/steps.json": ("run", "run"),
    f"run/stage-1/unet/{WEIGHTS}": ("export", "run", "-o", "exported"),
    "run/stage-1/unet/config.json": ("export", "run", "-o", "exported"),
    "run/stage-1/unet/.prunet.json": ("run", "run"),
    f"run/pipeline/unet/{WEIGHTS}": ("generate", "run", "a", "-o", "a.png"),
    "run/evaluation/evaluation.json": ("compare", "run", "again", "-o", "page.html"),
    "run/evaluation/pictures/after/0000.png": ("compare", "run", "again", "-o", "page.html"),
    "run/stage-1/log.jsonl": ("compare", "run", "again", "-o", "page.html"),
    "run/plan.json": ("compare", "run", "again", "-o", "page.html"),
}


def test_a_file_without_permission_is_not_called_damaged(shared, capsys, monkeypatch) -> None:
    monkeypatch.chdir(shared)
    for name, arguments in UNREADABLE.items():
        (shared / name).chmod(0)
        with another_user():
            code, _, err = call(capsys, *arguments)
        (shared / name).chmod(0o644)
        assert (code, err.count("error: ")) == (2, 1) and "Traceback" not in err, (name, err)
        assert name in err and "ermission" in err, (name, err)
        assert not any(word in err for word in ("cut off", "damaged", "delete", "no such file", "fetch")), (name, err)


def test_a_run_of_another_user_is_read_and_nothing_is_written_there(shared, capsys, monkeypatch) -> None:
    monkeypatch.chdir(shared)
    files = list(shared.rglob("*"))
    for path in files:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with another_user():
        for arguments in (
            ("run", "run", "--device", "cpu"),  # finished: nothing to do
            ("estimate", "run", "--device", "cpu"),
            ("inspect", "run"),
            ("compare", "run", "again", "-o", "page.html"),
            ("export", "run", "-o", "exported"),
            ("export", "run", "--single-file", "-o", "exported.safetensors"),
            ("generate", "run", "a", "--steps", 1, "-o", "a.png", "--device", "cpu"),
        ):
            code, _, err = call(capsys, *arguments)
            assert code == 0, (arguments, err)
        for arguments in (
            ("export", "run"),
            ("run", "run", "--set", "evaluation.steps=2", "--device", "cpu"),
            ("generate", "run", "a", "--steps", 1, "-o", "run/a.png", "--device", "cpu"),
        ):
            code, _, err = call(capsys, *arguments)
            assert (code, err.count("\n")) == (2, 1) and "rite" in err, (arguments, err)
    for path in files:
        path.chmod(0o755 if path.is_dir() else 0o644)
