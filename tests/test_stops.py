"""Whatever stops a run (a signal, a full disk), the same command then ends in the same files."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_run import contents

from prunet import UserError
from prunet.disk.files import clear_errors, new_file, new_folder
from prunet.disk.ownership import LOCK
from prunet.disk.seals import SEAL

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Forks:
    """Starts commands of prunet without the time of the imports."""

    def __init__(self) -> None:
        script = Path(__file__).parent / "run_forks.py"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.parent = subprocess.Popen([sys.executable, str(script)], env=ENV, **pipes)

    def start(self, log: Path, *arguments: object) -> int:
        assert self.parent.stdin is not None and self.parent.stdout is not None
        print(json.dumps([[*map(str, arguments)], str(log)]), file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline())

    def wait(self) -> int:
        assert self.parent.stdout is not None
        return int(self.parent.stdout.readline())


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.parent.kill()
    made.parent.wait()


def command(folder: Path, teacher: Path, pictures: Path) -> tuple[object, ...]:
    value = {
        "teacher": str(teacher),
        "plan": "bk-small",
        "data": {"source": str(pictures)},
        "stages": [{"steps": 4, "batch_size": 2, "warmup_steps": 1, "ema_decay": 0.9}, {"steps": 2, "batch_size": 2}],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 1},
        "sheet": {"every": 2},
        "export": {"single_file": True},
        "checkpoint_every": 1,
        "output": str(folder / "run"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(value))
    return ("run", folder / "recipe.yaml", "--device", "cpu", "--precision", "no")


@pytest.fixture(scope="module")
def whole(forks: Forks, sd: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An undisturbed run, and its duration in seconds."""
    folder, start = tmp_path_factory.mktemp("whole"), time.monotonic()
    forks.start(folder / "log", *command(folder, sd, pictures))
    assert forks.wait() == 0, (folder / "log").read_text()
    return folder / "run", time.monotonic() - start


def assert_same(run: Path, whole: Path) -> None:
    """Asserts equal bytes and the same files: nothing half-written is left."""
    assert contents(run) == contents(whole)
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (run, whole)]
    assert names[0] == names[1]


def kill_often(kills: int, forks: Forks, whole: tuple[Path, float], sd: Path, pictures: Path, tmp_path: Path) -> dict:
    rng, done, finished, codes, lasts = random.Random(17), 0, 0, {}, whole[1]
    while done < kills:
        assert finished <= 5 * kills, f"{finished} runs ended before a signal stopped them"
        folder = tmp_path / f"run-{finished}"
        asked = command(folder, sd, pictures)
        for left in reversed(range(5)):  # kills of one run; the last time it is not killed
            pid = forks.start(folder / "log", *asked)
            start = time.monotonic()
            if left and done < kills:
                number = STOPS[done % len(STOPS)]
                time.sleep(rng.uniform(0.05, lasts * 0.8))
                os.kill(pid, number) if alive(pid) else None
            code, text = forks.wait(), (folder / "log").read_text()
            assert "Traceback" not in text, text
            if code == 0:
                # The undisturbed run may have been slower, on a busy machine: then no kill would come in time.
                lasts = min(lasts, time.monotonic() - start) if left == 4 else lasts
                break
            assert code in (-number, 128 + number), (number, code, text)
            if code > 0:
                assert text.endswith("Stopped; written files are kept, and the same command resumes from there.\n")
            codes[signal.Signals(number).name, code] = codes.get((signal.Signals(number).name, code), 0) + 1
            done += 1
        assert code == 0, text
        assert_same(folder / "run", whole[0])
        shutil.rmtree(folder)
        finished += 1
        print(done, codes)
    return {"kills": done, "runs": finished, "codes": codes}


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.processes
def test_a_few_kills(forks, whole, sd, pictures, tmp_path) -> None:
    kill_often(6, forks, whole, sd, pictures, tmp_path)


@pytest.mark.slow
def test_200_kills(forks, whole, sd, pictures, tmp_path, capsys) -> None:
    found = kill_often(int(os.environ.get("KILLS", 200)), forks, whole, sd, pictures, tmp_path)
    with capsys.disabled():
        print(found)


# -- a full disk


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("cannot mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def fill_often(times: int, forks: Forks, whole: tuple[Path, float], sd: Path, pictures: Path, tmp_path: Path) -> dict:
    rng, failed, finished, lasts = random.Random(3), 0, 0, whole[1]
    with small_disk(tmp_path / "disk", "200m") as disk:
        while failed < times:
            assert finished <= 10 * times, f"{finished} runs ended before the disk was full"
            asked = command(tmp_path / f"run-{finished}", sd, pictures)
            asked += ("--set", f"output={disk / 'run'}")
            for left in reversed(range(4)):
                forks.start(tmp_path / "log", *asked)
                start = time.monotonic()
                if left and failed < times:
                    time.sleep(rng.uniform(0.05, lasts * 0.8))
                    fill(disk)
                code, text = forks.wait(), (tmp_path / "log").read_text()
                (disk / "ballast").unlink(missing_ok=True)
                errors = [line for line in text.splitlines() if line.startswith("error")]
                assert "Traceback" not in text and (code, len(errors)) in ((0, 0), (2, 1)), text
                if code == 0:
                    lasts = min(lasts, time.monotonic() - start) if left == 3 else lasts
                    break
                assert "No space left" in errors[0] or "B free" in errors[0], text
                failed += 1
            assert code == 0, text
            assert_same(disk / "run", whole[0])
            shutil.rmtree(disk / "run")
            finished += 1
            print(failed)
    return {"full": failed, "runs": finished}


@pytest.mark.processes
def test_a_disk_that_fills_twice(forks, whole, sd, pictures, tmp_path) -> None:
    fill_often(2, forks, whole, sd, pictures, tmp_path)


@pytest.mark.slow
def test_a_disk_that_fills_20_times(forks, whole, sd, pictures, tmp_path, capsys) -> None:
    found = fill_often(int(os.environ.get("FILLS", 20)), forks, whole, sd, pictures, tmp_path)
    with capsys.disabled():
        print(found)


NOISE = torch.randint(0, 256, (600, 600, 3), dtype=torch.uint8).numpy()
WRITE = {
    "safetensors": lambda path: save_file({"a": torch.randn(400_000)}, path),
    "torch": lambda path: torch.save({"a": torch.randn(400_000), "b": 1}, path),
    "png": lambda path: Image.fromarray(NOISE).save(path, format="PNG"),
    "jpeg": lambda path: Image.fromarray(NOISE).save(path, format="JPEG", quality=100),
    "text": lambda path: path.write_text("x" * 2_000_000),
}


@pytest.mark.parametrize("kind", WRITE)
def test_a_full_disk_is_one_line_whoever_writes(kind, tmp_path) -> None:
    """With a limit on file sizes, which needs no mount, and on a small disk where one can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"while writing|Cannot write"), new_file(tmp_path / "a") as part:
            WRITE[kind](part)
        with (
            pytest.raises(UserError, match=r"while writing|Cannot write"),
            new_folder(tmp_path / "b", "student") as part,
        ):
            WRITE[kind](part / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir()), "nothing half-written is left"
    with small_disk(tmp_path / "disk", "500k") as disk:
        with pytest.raises(UserError, match=f"No space left while writing {disk / 'a'}"), new_file(disk / "a") as part:
            WRITE[kind](part)
        assert not list(disk.iterdir())


def test_a_full_disk_during_a_copy_is_one_line(tmp_path) -> None:
    """shutil.Error has no errno; its text has the errors of all files."""
    (tmp_path / "from").mkdir()
    for name in "ab":
        (tmp_path / "from" / name).write_bytes(bytes(300_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with (
            pytest.raises(UserError, match=r"Cannot write \S+: File too large"),
            new_folder(tmp_path / "to", "x") as part,
        ):
            shutil.copytree(tmp_path / "from", part / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    full = shutil.Error([("a", "b", f"[Errno {errno.ENOSPC}] No space left on device: 'b'")])
    with (
        pytest.raises(UserError, match=f"No space left while writing {tmp_path / 'to'}"),
        clear_errors(tmp_path / "to"),
    ):
        raise full


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_full_disk_is_one_line_wherever_the_file_is_cut(kind, tmp_path) -> None:
    """torch has an error of its own for each part of an archive."""
    values = {"a": torch.randn(5_000), "b": {"c": torch.ones(300), "d": [1, 2.0]}}
    save = {"torch": torch.save, "safetensors": lambda v, path: save_file({"a": v["a"]}, path)}[kind]
    (tmp_path / "whole").mkdir()
    save(values, tmp_path / "whole" / "a")
    size = (tmp_path / "whole" / "a").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    coarse, fine = range(1000, size - 1500, 1999), range(size - 200, size, 23)  # the last parts are short
    for limit in (*range(1, 1000, 37), *coarse, *range(size - 1500, size - 200, 97), *fine):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match=r"while writing|Cannot write"), new_file(tmp_path / "a") as part:
                save(values, part)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path) -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("odd"), OSError(errno.EBUSY, "x")):
        with pytest.raises(type(error)), clear_errors(tmp_path):
            raise error


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_of_the_umask(umask, tmp_path) -> None:
    """Errors of safetensors, which has its own class, of copies, and of marks."""
    before = os.umask(umask)
    try:
        with new_file(tmp_path / "a.safetensors") as part:
            save_file({"a": torch.ones(1)}, part)
        with new_folder(tmp_path / "b", "student") as part:
            (part / "in").mkdir(mode=0o700)
            save_file({"a": torch.ones(1)}, part / "in" / "a.safetensors")
            (part / "copy").write_text("")
            (part / "copy").chmod(0o400)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    file, folder = 0o666 & ~umask, 0o777 & ~umask
    expected = {"a.safetensors": file, "b": folder, "b/in": folder, "b/in/a.safetensors": file, "b/copy": file}
    assert modes == expected | {f"b/{SEAL}": file}


def test_a_folder_that_was_being_replaced_comes_back(tmp_path) -> None:
    """A kill between the two renames leaves the old one under another name."""
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old" / "x").write_text("old")
    with pytest.raises(KeyError), new_folder(tmp_path / "a", "student"):
        raise KeyError
    assert (tmp_path / "a" / "x").read_text() == "old"


# -- signals


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_with_its_exit_code_and_a_message(number, forks, sd, pictures, tmp_path) -> None:
    pid = forks.start(tmp_path / "log", *command(tmp_path, sd, pictures))
    while alive(pid) and not (tmp_path / "run" / LOCK).exists():
        time.sleep(0.01)
    timer = threading.Timer(0.3, lambda: os.kill(pid, number))
    timer.start()
    code, text = forks.wait(), (tmp_path / "log").read_text()
    timer.join()
    assert code == 128 + number, text
    assert text.endswith("Stopped; written files are kept, and the same command resumes from there.\n")


@pytest.mark.processes
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP."""
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom prunet import cli\n"
    code += "cli._listen(); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "True\n"
