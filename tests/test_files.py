"""Files are whole or absent: whatever stops a write, the old file stays until the new one is whole."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from prunet.disk.files import check_writable, new_file, new_folder, read_json, read_label, write_json, write_text
from prunet.disk.seals import verify
from prunet.errors import UserError


def write(path: Path, text: str) -> None:
    with new_folder(path, "student") as part:
        (part / "a").write_text(text)
        (part / "deep").mkdir()
        (part / "deep" / "b").write_text(text)


def texts(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "deep/b")]


def killed_at(call: int, do: Callable[[], object]) -> bool:
    """Runs it in a fork that is killed before its `call`-th rename or removal; returns False if there are fewer."""
    if not (child := os.fork()):
        calls = iter(range(call, -1, -1))

        def counted(real: Callable) -> Callable:
            def maybe(*args: object, **options: object) -> object:
                if next(calls) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return maybe

        os.replace, shutil.rmtree = counted(os.replace), counted(shutil.rmtree)  # only in the fork
        try:
            do()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), new_file(tmp_path / "a") as part:
        part.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), new_file(tmp_path / "b"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(KeyError), new_folder(tmp_path / "a", "student") as part:
        (part / "a").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert texts(tmp_path / "a") == ["old", "old"]


def test_a_kill_anywhere_leaves_the_old_file_or_the_new_one(tmp_path) -> None:
    file, ends, call = tmp_path / "a", [], 0
    write_text(file, "old")
    while killed_at(call, lambda: write_text(file, "new")):
        ends.append(file.read_text())
        write_text(file, "old")  # over the files that the kill left
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        call += 1
    assert set(ends) == {"old", "new"} and ends == sorted(ends, reverse=True)  # first the old one, then the new one
    assert file.read_text() == "new"


def test_a_kill_anywhere_leaves_the_old_folder_or_the_new_one(tmp_path) -> None:
    folder, ends, call = tmp_path / "a", [], 0
    write(folder, "old")
    while killed_at(call, lambda: write(folder, "new")):
        with pytest.raises(KeyError), new_folder(folder, "student"):  # the next command, which fails early
            raise KeyError
        verify(folder, "")
        ends.append(texts(folder))
        write(folder, "old")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        call += 1
    assert set(map(tuple, ends)) == {("old", "old"), ("new", "new")} and ends == sorted(ends, reverse=True)
    assert texts(folder) == ["new", "new"]


def test_a_link_to_a_folder_stays(tmp_path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "a").symlink_to("large-disk")
    for text in ("one", "two", "three"):
        write(tmp_path / "a", text)
        assert texts(tmp_path / "large-disk") == [text, text]
    assert (tmp_path / "a").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "large-disk"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(f"/proc/self/fd/{fd}").readlink().name) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(f"to {Path(b).name}") or replace(a, b))
    write_text(tmp_path / "file", "x")
    assert done == ["file", "to file"]
    done.clear()
    write(tmp_path / "folder", "x")
    assert {"a", "b"} < set(done[:-1]) and done[-1] == "to folder"


def test_json_that_was_changed_is_noticed(tmp_path) -> None:
    path, value = tmp_path / "a.json", {"b": [1, 2.5, None], "ü": "猫"}
    write_json(path, value)
    assert read_json(path) == value
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(UserError, match=r"a\.json: damaged or changed .*: do this"):
        read_json(path, "do this")
    path.write_text(json.dumps(value))  # as older versions wrote it
    assert read_json(path) == value
    write_json(path, [1])
    assert read_json(path) == [1]
    for text in ("{", "", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"a\.json: not readable as JSON .*: delete it and") as error:
            read_json(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(tmp_path / "none.json")


def test_a_label_has_its_keys(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1, "b": 2})
    assert read_label(path, ("a", "b")) == {"a": 1, "b": 2}
    with pytest.raises(UserError, match=r"no 'c' in it\): do this"):
        read_label(path, ("a", "c", "d"), "do this")
    write_json(path, [1])
    with pytest.raises(UserError, match="no 'a' in it"):
        read_label(path, ("a",))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path) -> None:
    assert check_writable(tmp_path / "a" / "b", "output") == tmp_path
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: .*/file is a file, not a folder: give another path$"):
        check_writable(tmp_path / "file" / "a", "output")
    for path in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"Cannot write .*; give another path"):
            write_text(path, "x")
