"""Results of a run are verified, made again if they are missing, and never replaced if the user changed them."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from test_cli import call
from test_damage import WEIGHTS, do_as_told, last_byte
from test_ownership import tree

from prunet import Run, Runtime, UserError, load_recipe
from prunet.report.run import write_report
from prunet.runs import run as runs

CPU = Runtime(device="cpu", precision="no", log_every=1)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def opened(folder: Path, *overrides: str) -> Run:
    return Run(load_recipe(folder / "recipe.yaml", [f"output={json.dumps(str(folder))}", *overrides]), CPU)


SEALED = (
    f"student/{WEIGHTS}",
    "stage-1/unet/config.json",
    f"stage-1/unet/{WEIGHTS}",
    f"pipeline/vae/{WEIGHTS}",
    "pipeline/text_encoder/model.safetensors",
    "pipeline/scheduler/scheduler_config.json",
)


@pytest.mark.parametrize("name", SEALED)
def test_changed_results_are_noticed_and_missing_ones_made_again(name, folder, finished, capsys) -> None:
    """A changed file is named, with advice to delete it; a missing one is made again, identical, without training."""
    trained = (folder / "stage-1" / "log.jsonl").stat().st_mtime_ns
    last_byte(folder / name)
    with pytest.raises(UserError, match=f"{name}: damaged or changed .*: delete it, and") as error:
        opened(folder).finish()
    do_as_told(str(error.value), folder)
    assert not (folder / name).exists()
    is_read = name.startswith("pipeline")  # a finished run makes only those files again that a later step reads
    assert bool(opened(folder).todo()) == is_read
    capsys.readouterr()
    opened(folder).do(Path(name).parts[0].replace("student", "build").replace("pipeline", "export"))
    assert f"{name} is missing: it is made again" in " ".join(capsys.readouterr().err.split())
    assert (folder / name).read_bytes() == (finished / name).read_bytes()
    opened(folder).finish()
    assert not opened(folder).todo("distil")
    if is_read:
        assert (folder / "stage-1" / "log.jsonl").stat().st_mtime_ns == trained


@pytest.mark.parametrize("name", [f"pipeline/vae/{WEIGHTS}", f"stage-1/unet/{WEIGHTS}"])
def test_cut_off_weights_are_made_again(name, folder, finished) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-9])
    opened(folder).do("stage-1" if "stage" in name else "export")
    assert (folder / name).read_bytes() == whole


def test_a_damaged_stage_without_checkpoints_is_not_trained_again_unasked(folder) -> None:
    shutil.rmtree(folder / "stage-1" / "checkpoints")
    last_byte(folder / "stage-1" / "unet" / WEIGHTS)
    with pytest.raises(UserError, match=r"its checkpoints are gone: .* delete it to train the stage again"):
        opened(folder).finish()


def edited(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


#: What the user did -> the file that a refusal names, and the change by which the run would replace it.
USERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an added LoRA": ("pipeline/lora.safetensors", lambda p: p.write_text("mine"), "export.license=mit"),
    "an edited card": ("pipeline/README.md", edited, "export.license=mit"),
    "an edited config": ("pipeline/vae/config.json", edited, "evaluation.steps=2"),
    "a U-Net of a stage": (f"stage-1/unet/{WEIGHTS}", last_byte, "stages.0.steps=3"),
    "notes beside it": ("stage-1/unet/notes.txt", lambda p: p.write_text("mine"), "stages.0.steps=3"),
    "a single file": ("student.safetensors", lambda p: p.write_text("mine"), "export.single_file=true"),
    "configs": ("student.config", lambda p: (p.mkdir(), (p / "a").write_text("mine")), "export.single_file=true"),
    "a page": ("report.html", lambda p: p.write_text("mine"), "evaluation.steps=2"),
}


@pytest.mark.parametrize("what", USERS)
def test_files_of_the_user_are_not_replaced(what, folder) -> None:
    name, change, override = USERS[what]
    step = next((step for start, step in (("stage-1", "stage-1"), ("report", "report")) if start in name), "export")
    change(folder / name)
    before = tree(folder)
    with pytest.raises(UserError, match=name):
        opened(folder, override).check()
    assert tree(folder) == before
    with pytest.raises(UserError, match=name):  # also if it appeared after the check, while the run was training
        opened(folder, override).do(step)


def test_a_single_file_of_prunet_is_replaced_unless_it_was_changed(folder, capsys) -> None:
    export = ("export", folder, "--single-file")
    assert call(capsys, *export)[0] == 0
    assert call(capsys, *export, "--fp16")[0] == 0
    last_byte(folder / "student.safetensors")
    code, _, err = call(capsys, *export)
    assert code == 2 and "student.safetensors exists, and is not a" in err


def test_a_finished_step_needs_nothing_that_it_has_read(folder, finished, capsys) -> None:
    """A user may delete the files that only training needs."""
    for name in ("cache", "stage-1/checkpoints", "student"):
        shutil.rmtree(folder / name)
    log = (folder / "stage-1" / "log.jsonl").stat().st_mtime_ns
    assert opened(folder, "export.single_file=true").todo() == ["export", "report"]
    asked = ("--set", "export.single_file=true", "--device", "cpu", "--precision", "no")
    assert call(capsys, "run", folder, *asked)[0] == 0
    assert (folder / "student.safetensors").is_file() and not (folder / "cache").exists()
    assert (folder / "stage-1" / "log.jsonl").stat().st_mtime_ns == log
    shutil.copytree(finished / "cache", folder / "cache")
    (folder / "cache" / "shard-00000.safetensors").unlink()
    assert call(capsys, "export", folder, "-o", folder.parent / "exported")[0] == 0
    assert "12 samples at 16 px" in (folder.parent / "exported" / "README.md").read_text()
    shutil.rmtree(folder / "stage-1" / "unet")
    assert opened(folder).todo() == []
    assert opened(folder, "evaluation.steps=2").todo() == ["build", "stage-1", "evaluate", "export", "report"]
    code, _, err = call(capsys, "export", folder, "-o", folder.parent / "again")
    assert code == 2 and err.endswith(f"stage-1/unet: deleted after the run: `prunet distil {folder}` makes it again\n")


@pytest.mark.parametrize(
    ("output", "cache", "words"),
    [
        ("run", "run/pipeline", "lies in the output"),
        ("run", "run/stage-1", "lies in the output"),
        ("run", "link/evaluation", "lies in the output"),
        ("run", "run/cache/more", "lies in the output"),
        ("cache/run", "cache", "lies in .*cache"),
        ("x", "x", "the output .* is .*x"),
        ("run", "run/cache", None),
        ("run", "cache", None),
    ],
)
def test_output_and_cache_do_not_lie_in_each_other(output, cache, words, finished, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    places = [f"output={tmp_path / output}", f"cache={tmp_path / cache}"]
    this = Run(load_recipe(finished / "recipe.yaml", places), CPU)
    with pytest.raises(UserError, match=f"^cache: .*{words}") if words else nullcontext():
        this.check()


def test_a_stopped_stage_says_from_which_step_it_resumes(folder, capsys, monkeypatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "distil", stop)
    for words in ("stage-1 resumes from step 2 of 3", "stage-1 begins again at step 0 of 3"):
        with pytest.raises(KeyboardInterrupt):
            opened(folder, "stages.0.steps=3").finish()
        assert words in " ".join(capsys.readouterr().err.split())
        shutil.rmtree(folder / "stage-1" / "checkpoints", ignore_errors=True)


def test_a_page_that_another_command_writes_again_is_no_damaged_one(folder, capsys) -> None:
    """`prunet measure RUN` and others add their results to the page; whoever changes it by hand is told."""
    this = Run(load_recipe(folder / "recipe.yaml", [f"output={folder}"]), CPU)
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    this.finish()
    assert (folder / "report.html").read_bytes() != before  # it has the time of the step that wrote the first one
    (folder / "report.html").write_bytes(before)
    with pytest.raises(UserError, match=r"report\.html: damaged or changed after it was written"):
        this.finish()
