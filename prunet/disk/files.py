"""Files that are either whole or not there: written aside, synced, and renamed; and what they say when read again."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prunet.disk.reading import parse_json
from prunet.disk.seals import CHECKSUM, json_checksum, seal
from prunet.errors import UserError

#: What is wrong with a path, or with who wants to write there.
UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.EINVAL),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

AGAIN = "delete it and give the same command again"


def aside(path: Path) -> Path:
    """The name under which `path` is written until it is whole."""
    return path.with_name(f".{path.name}.part")


def _finish(path: Path, umask: int) -> None:
    """Whoever may read other new files of this user may read this one (safetensors writes for its owner alone); and
    its bytes are on the disk before its name is.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = (mode & 0o7000) | ((0o777 if path.is_dir() else 0o666) & ~umask)
    if mode != wanted:
        with suppress(PermissionError):  # a file system that has no modes
            path.chmod(wanted)
    if path.is_file():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _umask() -> int:
    os.umask(umask := os.umask(0o077))
    return umask


def _new_part(part: Path) -> None:
    if part.is_file():  # an older version wrote files aside as files
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a name to write to; what was written appears as `path` when the block ends without an error."""
    part = aside(path)  # a folder, because safetensors leaves a file with a name of its own when it is killed
    try:
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _new_part(part)
            yield part / path.name
            _finish(part / path.name, _umask())
            os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_folder(path: Path, what: str, made_from: str | None = None) -> Iterator[Path]:
    """Like `new_file` for a folder; a folder that was there is replaced only when the new one is whole.

    It is sealed as a `what` of prunet's, with the checksums of its files and the fingerprint that it was `made_from`.
    """
    part, old = aside(path), path.with_name(f".{path.name}.old")
    try:
        with clear_errors(path):
            if old.exists() and not path.exists():  # killed between the two renames below
                os.replace(old, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _new_part(part)
            yield part
            seal(part, what, made_from)
            umask = _umask()
            for inside in part.rglob("*"):
                _finish(inside, umask)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission is the user's to fix: one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left while writing {path}; what was finished before is kept") from error
        if number == errno.EFBIG:
            raise UserError(f"Cannot write {path}: {os.strerror(number)}; what was finished before is kept") from error
        if number in UNWRITABLE:
            raise UserError(f"Cannot write {path}: {os.strerror(number)}; give another path") from error
        raise


def _error_number(error: BaseException) -> int | None:
    """The system's number of an error in writing. safetensors has it in its text; torch and Pillow lose it, and what
    stops them in the middle of a file is a full disk, nearly always.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors' words, or those of shutil.Error, which holds the errors of several files.
    if found := re.search(r"(?:\(os error |\[Errno )(\d+)[\])]", str(error)):
        return int(found[1])
    lost = r"PytorchStreamWriter|inline_container|iostream error|encoder error"
    return errno.ENOSPC if re.search(lost, str(error)) else None


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
    """An object gets a checksum, which `read_json` verifies and takes out again."""
    if isinstance(value, dict):
        value = value | {CHECKSUM: json_checksum(value, path.name)}
    with new_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path, fix: str = AGAIN) -> Any:
    """The JSON value in a file that prunet wrote.

    Raises:
        UserError: not there, not JSON any more, or not what was written there; says how to `fix` it.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}): {fix}") from error
    checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if checksum is not None and checksum != json_checksum(value, path.name):
        raise UserError(f"{path}: damaged or changed (its checksum is another than when it was written): {fix}")
    return value


def read_label(path: Path, keys: Iterable[str], fix: str = AGAIN) -> dict[str, Any]:
    """The JSON object in a file that prunet wrote, which must have `keys`.

    Raises:
        UserError: not there, or not whole any more; says how to `fix` it.
    """
    value = read_json(path, fix)
    if missing := sorted(set(keys) - (value.keys() if isinstance(value, dict) else set())):
        raise UserError(f"{path}: damaged, or of another version (no {missing[0]!r} in it): {fix}")
    return value  # type: ignore[no-any-return]
