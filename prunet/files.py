"""Files that are either whole or not there: written aside, synced, and renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunet.errors import UserError
from prunet.reading import parse_json

#: What is wrong with a path, or with who wants to write there.
UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.EINVAL),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def aside(path: Path) -> Path:
    """The name under which `path` is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a name to write to; what was written appears as `path` when the block ends without an error."""
    part = aside(path)
    try:
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            _sync(part)
            os.replace(part, path)
    finally:
        if part.is_file():
            part.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Like `new_file` for a folder; a folder that was there is replaced only when the new one is whole."""
    part, old = aside(path), path.with_name(f".{path.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.mkdir()
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    _sync(file)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission is the user's to mend: one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left while writing {path}; what was finished before is kept") from error
        if error.errno in UNWRITABLE:
            raise UserError(f"Cannot write {path}: {error.strerror}; give another path") from error
        raise


def check_writable(folder: Path, what: str) -> Path:
    """The folder in which `folder` is or will be made.

    Raises:
        UserError: it cannot be; `what` is the name of the setting.
    """
    with clear_errors(folder):
        where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not where.is_dir():
        raise UserError(f"{what}: {where} is a file; a folder is needed there")
    if not os.access(where, os.W_OK):
        raise UserError(f"{what}: cannot write into {where}; give another path")
    return where


def write_json(path: Path, value: Any) -> None:
    with new_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path, mend: str = "delete it and give the same command again") -> Any:
    """The JSON value in a file that prunet wrote.

    Raises:
        UserError: not there, or not JSON any more; says how to `mend` it.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}): {mend}") from error


def read_label(path: Path, keys: Iterable[str], mend: str) -> dict[str, Any]:
    """The JSON object in a file that prunet wrote, which must have `keys`.

    Raises:
        UserError: not there, or not whole any more; says how to `mend` it.
    """
    value = read_json(path, mend)
    if missing := sorted(set(keys) - (value.keys() if isinstance(value, dict) else set())):
        raise UserError(f"{path}: damaged, or of another version (no {missing[0]!r} in it): {mend}")
    return value
