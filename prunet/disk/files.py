"""Writes files that are either whole or absent (written to a temporary folder, synced, renamed), and reads them."""

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

from prunet.disk.reading import check_permission, parse_json
from prunet.disk.seals import CHANGED, CHECKSUM, json_checksum, seal
from prunet.errors import UserError

#: Error numbers of a path that cannot be written, or that this user may not write.
UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.EINVAL),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

AGAIN = "delete it and give the same command again"


def aside(path: Path) -> Path:
    """Returns the temporary name of `path` until it is whole."""
    return path.with_name(f".{path.name}.part")


def _finish(path: Path, umask: int) -> None:
    """Gives a file the user's default permissions and syncs its bytes to disk, before it gets its name.

    safetensors lets only the owner read its files.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = (mode & 0o7000) | ((0o777 if path.is_dir() else 0o666) & ~umask)
    if mode != wanted:
        with suppress(PermissionError):  # a file system without permissions
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
    if part.is_file():  # older versions used a temporary file, not a folder
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; the file appears as `path` when the block ends without an error."""
    part = aside(path)  # a folder, because safetensors, if killed, leaves a file under its own name
    try:
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _new_part(part)
            yield part / path.name
            _finish(part / path.name, _umask())
            (part / path.name).replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def new_folder(path: Path, what: str, made_from: str | None = None) -> Iterator[Path]:
    """Does the same as `new_file` for a folder; an existing folder is replaced only when the new one is whole.

    A link to a folder stays, and the folder that it leads to is replaced. The folder is sealed with its kind `what`,
    the checksums of its files, and the fingerprint `made_from`.
    """
    path = path.resolve()
    part, old = aside(path), path.with_name(f".{path.name}.old")
    try:
        with clear_errors(path):
            if old.exists() and not path.exists():  # killed between the two renames below
                old.replace(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _new_part(part)
            yield part
            umask = _umask()
            _finish(part, umask)  # a copy of a read-only folder is read-only too
            seal(part, what, made_from)
            for inside in part.rglob("*"):
                _finish(inside, umask)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.replace(old)
            part.replace(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns errors that the user can fix, such as a full disk or a missing permission, into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left while writing {path}: free some; finished files are kept") from error
        if number == errno.EFBIG:
            raise UserError(f"Cannot write {path}: {os.strerror(number)}; finished files are kept") from error
        if number in UNWRITABLE:
            raise UserError(f"Cannot write {path}: {os.strerror(number)}; give another path") from error
        raise


def _error_number(error: BaseException) -> int | None:
    """Returns the system's number of an error in writing, if it is known.

    safetensors has the number in its text. torch and Pillow lose it, but if they stop in the middle of a file, the disk
    is nearly always full.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors wrote the text, or shutil.Error, which joins the errors of several files.
    if found := re.search(r"(?:\(os error |\[Errno )(\d+)[\])]", str(error)):
        return int(found[1])
    lost = r"PytorchStreamWriter|inline_container|iostream error|encoder error"
    return errno.ENOSPC if re.search(lost, str(error)) else None


def check_writable(folder: Path, what: str) -> Path:
    """Returns the nearest existing folder: `folder` or one above it.

    Raises:
        UserError: the folder cannot be written to; `what` is the name of the setting.
    """
    with clear_errors(folder):
        where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not where.is_dir():
        raise UserError(f"{what}: {where} is a file, not a folder: give another path")
    if not os.access(where, os.W_OK):
        raise UserError(f"{what}: cannot write into {where}; give another path")
    return where


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value; an object also gets a checksum, which `read_json` verifies and removes."""
    if isinstance(value, dict):
        value = value | {CHECKSUM: json_checksum(value, path.name)}
    with new_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path, fix: str = AGAIN) -> Any:
    """Reads the JSON value in a file that prunet wrote.

    Raises:
        UserError: the file is missing, not JSON, or was changed after prunet wrote it; the message ends with `fix`.
    """
    check_permission(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}): {fix}") from error
    checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    if checksum is not None and checksum != json_checksum(value, path.name):
        raise UserError(f"{path}: {CHANGED}: {fix}")
    return value


def read_label(path: Path, keys: Iterable[str], fix: str = AGAIN) -> dict[str, Any]:
    """Reads the JSON object in a file that prunet wrote, and refuses an object that lacks one of `keys`.

    Raises:
        UserError: the file is missing or not whole; the message ends with `fix`.
    """
    value = read_json(path, fix)
    if missing := sorted(set(keys) - (value.keys() if isinstance(value, dict) else set())):
        raise UserError(f"{path}: damaged, or of another version (no {missing[0]!r} in it): {fix}")
    return value  # type: ignore[no-any-return]
