"""No file of the user is overwritten, whatever the output of a command is; one process at a time writes to a folder."""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_cli import call, recipe

from prunet import Runtime, UserError, load_recipe, run
from prunet.disk import ownership
from prunet.disk.files import new_folder
from prunet.disk.ownership import LOCK, check_place, hold, kind_of, worker_of
from prunet.disk.seals import SEAL
from prunet.evaluation import measuring
from prunet.exports import folder as pipeline
from prunet.exports import single_file
from prunet.runs import ablation
from prunet.runs import run as runs
from prunet.sampling import draw
from prunet.speed import bench as inference
from prunet.speed import models
from prunet.student import folder as student_folder

CPU = Runtime(device="cpu", precision="no", log_every=1)


class Begins(Exception):
    """Raised where the work would begin."""


def begin(*args: object, **options: object) -> None:
    raise Begins


@pytest.fixture
def files(finished: Path, sd: Path, pictures: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "finished")
    shutil.copytree(sd, tmp_path / "teacher")
    shutil.copytree(pictures, tmp_path / "pictures")
    return tmp_path


def with_recipe(files: Path, **changes: object) -> Path:
    stages = [{"steps": 2, "batch_size": 2, "warmup_steps": 0}]
    return recipe(files, files / "teacher", files / "pictures", stages=stages, **changes)


def with_ablation(files: Path, place: Path) -> Path:
    value = {"recipe": str(with_recipe(files)), "arms": {"a": {}}, "output": str(place)}
    (files / "ablation.yaml").write_text(yaml.safe_dump(value))
    return files / "ablation.yaml"


def with_protocol(files: Path) -> Path:
    (files / "prompts.txt").write_text("a\nb\n")
    given = {"source": "Here.", "file": "prompts.txt"}
    value = {"name": "x", "prompts": given, "metrics": ["clip_score"], "clip": {"model": "x", "source": "There."}}
    (files / "protocol.yaml").write_text(yaml.safe_dump(value))
    return files / "protocol.yaml"


#: Verb -> its arguments for a place to write to, and what it makes there.
VERBS: dict[str, tuple[Callable[[Path, Path], tuple], str]] = {
    "build": (lambda f, to: ("build", f / "teacher", "--plan", "bk-tiny", "-o", to), "student"),
    "export": (lambda f, to: ("export", f / "finished", "-o", to), "pipeline"),
    "export --single-file": (
        lambda f, to: ("export", f / "finished", "--single-file", "-o", to.with_suffix(".safetensors")),
        "configs",
    ),
    **{
        verb: (lambda f, to, verb=verb: (verb, with_recipe(f, output=str(to)), "--device", "cpu"), "run")
        for verb in ("run", "cache", "distil", "evaluate")
    },
    "run with a cache": (lambda f, to: ("run", with_recipe(f, cache=str(to)), "--device", "cpu"), "cache"),
    "ablate": (lambda f, to: ("ablate", with_ablation(f, to), "--device", "cpu"), "ablation"),
    "measure": (
        lambda f, to: ("measure", f / "teacher", "--protocol", with_protocol(f), "-o", to, "--device", "cpu"),
        "measurement",
    ),
    "bench": (lambda f, to: ("bench", f / "teacher", "-o", to, "--device", "cpu"), "bench"),
    "generate": (lambda f, to: ("generate", f / "teacher", "a", "-o", to, "--device", "cpu"), "pictures"),
}


def own(place: Path, what: str) -> None:
    if what in ("student", "pipeline", "configs"):
        with new_folder(place, what) as part:
            (part / "config.json").write_text("{}")
    else:
        with hold(place, what):
            pass


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


#: What lies there -> how it comes there (from the files, the place, what the verb makes), and whether the verb begins.
THERE: dict[str, tuple[Callable[[Path, Path, str], object], bool | None]] = {
    "nothing": (lambda f, to, what: None, True),
    "an empty folder": (lambda f, to, what: to.mkdir(), True),
    "what a kill left": (lambda f, to, what: write(to / f".{SEAL}.part" / SEAL), True),
    "its own": (lambda f, to, what: own(to, what), True),
    "foreign files": (lambda f, to, what: write(to / "notes.txt"), False),
    "a foreign recipe": (lambda f, to, what: write(to / "recipe.yaml"), False),
    "a hidden file": (lambda f, to, what: write(to / ".git" / "config"), False),
    "a file": (lambda f, to, what: write(to), False),
    "another kind of prunet's": (lambda f, to, what: own(to, "student" if what != "student" else "pipeline"), False),
    "another's cache": (lambda f, to, what: shutil.copytree(f / "finished" / "cache", to), None),
    "a teacher": (lambda f, to, what: shutil.copytree(f / "teacher", to), False),
    "a link to its teacher": (lambda f, to, what: to.symlink_to(f / "teacher"), False),
    "a link to a part of it": (lambda f, to, what: to.symlink_to(f / "teacher" / "unet"), False),
    "a link that leads round": (lambda f, to, what: to.symlink_to(to), False),
    "its data": (lambda f, to, what: shutil.copytree(f / "pictures", to), False),
}


def tree(folder: Path) -> dict[str, tuple[int, ...] | None]:
    """Lists the files with their bytes and times, and the folders without times, because reading may change these."""
    found = {p: p.lstat() for p in folder.rglob("*")}
    return {
        str(p): (s.st_ino, s.st_size, s.st_mtime_ns) if not stat.S_ISDIR(s.st_mode) else None for p, s in found.items()
    }


#: Verbs that go the same way as `run` are tried by `make test-slow`.
each_verb = pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=pytest.mark.slow) if v in ("cache", "distil") else v for v in VERBS]
)


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every kind of work raise `Begins` at its start."""
    for module, name in (
        (student_folder, "save_unet"),
        (pipeline, "export"),
        (single_file, "export_single_file"),
        (draw, "generate"),
        (runs.Run, "finish"),
        (ablation, "Run"),
        (measuring.Reference, "open"),
        (inference, "bench"),
    ):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(models, "open_models", lambda *args, **options: [])


@each_verb
def test_existing_contents_decide_whether_a_folder_is_written(verb, files, capsys, begins) -> None:
    arguments, what = VERBS[verb]
    for there, (put, expected) in THERE.items():
        to = files / f"{verb} {there}".replace(" ", "-")
        to = to.with_suffix(".config") if what == "configs" else to
        put(files, to, what)
        args = arguments(files, to)
        before = tree(files)
        if expected or (there == "another's cache" and what == "cache"):
            with pytest.raises(Begins):
                call(capsys, *args)
        else:
            code, _, err = call(capsys, *args)
            assert (code, err.count("\n")) == (2, 1), (there, err)
            assert err.startswith("error: ") and ("output" in err or "cache" in err), (there, err)
            assert tree(files) == before, there


@each_verb
def test_nothing_is_written_into_or_above_an_input(verb, files, capsys, begins) -> None:
    arguments, what = VERBS[verb]
    end = "x.config" if what == "configs" else "x"
    refused = [files / "teacher" / end, files / "teacher" / "unet" / "deep" / end, files / "finished/cache" / end]
    parts = ("pipeline/vae", "student", "stage-1", "evaluation", "evaluation/pictures", "stage-7")
    refused += [files / "finished" / part / end for part in parts]
    if what in ("run", "cache", "ablation"):
        refused += [files / "pictures" / end, files]
    for to in refused:
        args = arguments(files, to)
        before = tree(files)
        code, _, err = call(capsys, *args)
        assert (code, err.count("\n")) == (2, 1), (to, err)
        assert tree(files) == before, to
    if what in ("bench", "measurement", "pictures", "pipeline", "student"):
        with pytest.raises(Begins):  # results may be written beside the parts of a run
            call(capsys, *arguments(files, files / "finished" / "x"))


def test_what_was_changed_in_a_folder_of_prunets_is_not_lost(files, capsys, begins) -> None:
    def add(folder: Path) -> None:
        write(folder / "notes.md")

    def change(folder: Path) -> None:
        write(folder / "config.json", "{ }")

    for verb in ("build", "export", "export --single-file"):
        arguments, what = VERBS[verb]
        for edit, words in ((add, "notes.md: not made by prunet"), (change, "config.json: damaged or changed")):
            to = files / f"{verb}-{edit.__name__}.config"
            own(to, what)
            edit(to)
            code, _, err = call(capsys, *arguments(files, to))
            assert code == 2 and words in err, err


def test_single_files(files, capsys, monkeypatch) -> None:
    """A picture or page is replaced if prunet drew it; a model never."""
    draw = ("generate", files / "teacher", "a", "--steps", 1, "--device", "cpu", "-o")
    for name in ("a.png", "a.jpg", "a.webp"):
        assert call(capsys, *draw, files / name)[0] == 0
        assert call(capsys, *draw, files / name)[0] == 0
        Image.new("RGB", (8, 8)).save(files / f"mine-{name}")
        code, _, err = call(capsys, *draw, files / f"mine-{name}")
        assert code == 2 and "exists, and is not a" in err
    shutil.copytree(files / "finished", files / "again")
    compare = ("compare", files / "finished", files / "again", "-o")
    assert call(capsys, *compare, files / "page.html")[0] == 0
    assert call(capsys, *compare, files / "page.html")[0] == 0
    report = files / "finished" / "report.html"
    for path, words in (
        (write(files / "mine.html", "<html>"), "exists, and is not an unchanged comparison of prunet"),
        (files / "teacher" / "page.html", "which is a model"),
        (report, f"is a name for the run {files / 'finished'} itself"),
        (files / "again" / "evaluation" / "page.html", f"is a name for the run {files / 'again'} itself"),
    ):
        before = tree(files)
        code, _, err = call(capsys, *compare, path)
        assert code == 2 and "\n" not in err.strip() and words in err and tree(files) == before
    model = write(files / "model.safetensors")
    code, _, err = call(capsys, "export", files / "finished", "--single-file", "-o", model)
    assert code == 2 and model.read_text() == "mine"


def test_pictures_of_another_prompt_are_not_replaced(files, capsys) -> None:
    """Their names are only seeds."""
    draw = ("generate", files / "teacher", "--steps", 1, "--device", "cpu", "-o", files / "drawn")
    for prompt, code in (("a cät", 0), ("a cät", 0), ("a dog", 2)):
        assert call(capsys, *draw, prompt)[0] == code
    (files / "drawn" / "000001.png").write_text("mine")
    before = tree(files / "drawn")
    for arguments, words in ((("a dog",), "another prompt"), (("a cät", "-n", 2), "not an unchanged picture")):
        code, _, err = call(capsys, *draw, *arguments)
        assert code == 2 and words in err and err.count("\n") == 1
    assert tree(files / "drawn") == before


def test_folders_of_versions_without_marks_are_recognised(files) -> None:
    for mark in (files / "finished").rglob(SEAL):
        mark.unlink()
    assert [kind_of(files / "finished" / name) for name in ("", "cache", "pipeline")] == ["run", "cache", None]
    run(load_recipe(files / "finished" / "recipe.yaml", [f"output={json.dumps(str(files / 'finished'))}"]), CPU)


@pytest.mark.parametrize(
    "names",
    [("recipe.yaml", "plan.json"), ("recipe.yaml", "steps.json"), ("spec.json",), ("caches/",), ("bench.json",)],
)
def test_a_folder_is_not_prunets_by_a_name_that_others_give_too(names, tmp_path) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("{}")
    assert kind_of(tmp_path) is None
    with pytest.raises(UserError, match="contains files that prunet did not make"):
        check_place(tmp_path, "run", "output")


# -- one at a time


def other_process(folder: Path) -> subprocess.Popen:
    code = (
        "import sys; from pathlib import Path; from prunet.disk.ownership import hold\n"
        "with hold(Path(sys.argv[1]), 'run'): print('held', flush=True); sys.stdin.read()"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    return held


def test_one_writer_at_a_time_and_any_number_of_readers(files, capsys) -> None:
    folder = files / "finished"
    held = other_process(folder)
    try:
        code, _, err = call(capsys, "run", folder, "--set", "evaluation.steps=2", "--device", "cpu")
        assert (code, err.count("\n")) == (2, 1) and f"process {held.pid} on " in err, err
        shutil.copytree(folder, files / "again")
        for reads in (
            ("run", folder, "--device", "cpu"),  # finished: nothing to do
            ("compare", folder, files / "again", "-o", files / "page.html"),
            ("export", folder, "-o", files / "elsewhere"),
            ("generate", folder, "a", "--steps", 1, "-o", files / "a.png", "--device", "cpu"),
        ):
            assert call(capsys, *reads)[0] == 0, reads
    finally:
        held.kill()  # the lock dies with its process
        held.wait()
    assert call(capsys, "run", folder, "--set", "evaluation.steps=2", "--device", "cpu")[0] == 0


def test_the_seal_is_written_under_the_lock(tmp_path, monkeypatch) -> None:
    """Else two processes that start together write it at once, and one fails."""
    write, workers = ownership.seal_text, []
    monkeypatch.setattr(ownership, "seal_text", lambda what: workers.append(worker_of(tmp_path / "new")) or write(what))
    with hold(tmp_path / "new", "search"):
        assert kind_of(tmp_path / "new") == "search"
    assert len(workers) == 1 and f"process {os.getpid()} " in str(workers[0])


def test_a_command_that_is_refused_leaves_no_new_folder(tmp_path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for folder in (new, old):
        with pytest.raises(UserError), hold(folder, "pictures"), hold(folder, "pictures"):
            assert (folder / SEAL).is_file()
            raise UserError("size: 24 is no multiple of 64")
    assert not new.exists() and old.is_dir()
    with pytest.raises(UserError), hold(new, "pictures"):
        (new / "000000.png").touch()
        raise UserError("the disk is full")
    assert (new / "000000.png").is_file()


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch) -> None:
    """Another process fails, and removes the new folder, between the opening of the lock and the locking."""
    folder, flock, times = tmp_path / "new", ownership.fcntl.flock, []

    def removed_before(file: int, how: int) -> None:
        times.append(how)
        if len(times) == 1:
            ownership._remove_empty(folder)
        flock(file, how)

    monkeypatch.setattr(ownership.fcntl, "flock", removed_before)
    with hold(folder, "pictures"):
        assert {path.name for path in folder.iterdir()} == {SEAL, LOCK} and len(times) == 2


def test_a_process_may_take_its_lock_twice_and_a_fork_does_not_keep_it(tmp_path) -> None:
    with hold(tmp_path / "a", "run"), hold(tmp_path / "a", "run"):
        pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(tmp_path / "a", "run"))
        (read, write_end), (begun, begins) = os.pipe(), os.pipe()
        if not (child := os.fork()):
            os.close(write_end)
            os.write(begins, b"1")
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        assert os.read(begun, 1) == b"1"  # a busy machine may let the child wait
        stack.close()
        other = other_process(tmp_path / "a")
        with pytest.raises(UserError, match=rf"process {other.pid} on .* works in it"), hold(tmp_path / "a", "run"):
            pass
        other.kill()
        other.wait()
        os.close(write_end)
        os.waitpid(child, 0)
    assert (tmp_path / "a" / LOCK).is_file()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount")
def test_a_finished_run_may_lie_on_a_read_only_mount(files, capsys) -> None:
    folder = files / "finished"
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        assert call(capsys, "run", folder, "--device", "cpu")[0] == 0
        assert call(capsys, "export", folder, "-o", files / "elsewhere")[0] == 0
        code, _, err = call(capsys, "run", folder, "--set", "evaluation.steps=2", "--device", "cpu")
        assert (code, err.count("\n")) == (2, 1) and "cannot write into" in err
    finally:
        subprocess.run(["umount", folder], check=True)
