"""Seals and checksums (CRC-32, in hexadecimal), by which prunet recognises its own folders and notices damage.

The seal of a folder is the file `.prunet.json`: the folder's kind, when and by which version it was made, and the
checksums of its files if prunet wrote it as a whole.
"""

import json
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prunet import __version__
from prunet.disk.reading import check_permission
from prunet.errors import UserError

SEAL, CHECKSUM = ".prunet.json", "checksum"
PIECE = 1 << 24  # bytes read at once
CHANGED = "damaged or changed (its checksum differs from when it was written)"


def checksum(pieces: Iterable[Any]) -> str:
    """Returns the checksum of all pieces (anything with a buffer), one after the other."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return f"{value:08x}"


def file_checksum(path: Path) -> str:
    """Returns the checksum of a file's bytes.

    Raises:
        UserError: this user may not read the file.
    """
    check_permission(path)
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(PIECE), b""))


def json_checksum(value: Any, name: str) -> str:
    """Returns the checksum of a JSON value with its file's name, so that swapped files are noticed."""
    text = json.dumps([name, json.loads(json.dumps(value))], sort_keys=True)
    return checksum([text.encode()])


def seal(folder: Path, what: str, made_from: str | None = None) -> None:
    """Seals a folder that prunet writes as a whole, with the checksums of all its files."""
    files = {name: file_checksum(folder / name) for name in files_in(folder)}
    made = {"made_from": made_from} if made_from else {}
    (folder / SEAL).write_text(seal_text(what, **made, files=files), encoding="utf-8")


def seal_text(what: str, **more: Any) -> str:
    """Returns the text of a seal of kind `what`, with the keys `more`."""
    value = {"what": what, "by": f"prunet {__version__}", "when": datetime.now(UTC).isoformat(timespec="seconds")}
    value |= more
    return json.dumps(value | {CHECKSUM: json_checksum(value, SEAL)}, indent=2, ensure_ascii=False) + "\n"


def files_in(folder: Path) -> list[str]:
    """Lists all files and links below a folder, relative to it, except its seal."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in found if name != SEAL)


def read_seal(folder: Path) -> dict[str, Any] | None:
    """Reads the seal of a folder; None if it has none.

    Raises:
        UserError: the seal is damaged.
    """
    path = folder / SEAL
    check_permission(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop(CHECKSUM) != json_checksum(value, SEAL):
            raise ValueError("its checksum differs")
        if not (isinstance(value["what"], str) and isinstance(value.get("files", {}), dict)):
            raise ValueError("not a seal of prunet")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): delete it and give the same command again") from error
    return value  # type: ignore[no-any-return]


def verify(folder: Path, fix: str, made_from: str | None = None) -> None:
    """Compares a folder that prunet wrote as a whole with its seal; an older folder without a seal is not checked.

    Raises:
        UserError: a file is missing, cut off or changed, or the folder was made from other inputs than `made_from`;
            the message ends with `fix`.
    """
    seal = read_seal(folder)
    if seal is None:
        return
    if made_from is not None and seal.get("made_from", made_from) != made_from:
        raise UserError(f"{folder}: of another run, or made from other inputs: {fix}")
    if gone := next((path for path in sealed_files(folder) if not is_whole(path)), None):
        raise UserError(f"{gone}: {'cut off' if gone.exists() else 'missing'}: {fix}")
    if wrong := changed(folder, seal, but=("README.md",)):
        raise UserError(f"{wrong}: {fix}")


def sealed_files(folder: Path) -> list[Path]:
    """Lists the files of a folder according to its seal; none if it has no seal."""
    return [folder / name for name in (read_seal(folder) or {}).get("files", {})]


def changed(folder: Path, seal: dict[str, Any], but: Iterable[str] = ()) -> str | None:
    """Returns a text about the first file that was changed after prunet wrote it, except `but`; None if there is none.

    A file that is missing or cut off does not count, because it contains nothing that could be lost.
    """
    for name, expected in seal.get("files", {}).items():
        path = folder / name
        try:
            if name not in but and is_whole(path) and known_checksum(path) != expected:
                return f"{path}: {CHANGED}"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def is_whole(path: Path) -> bool:
    """Returns whether a file is there and, if it holds weights, not cut off (their header says how long they are).

    Raises:
        UserError: no permission to read it.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return path.exists()
    check_permission(path)
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


def known_checksum(path: Path) -> str:
    """Returns `file_checksum`, computed once for each state of a file, because commands ask for it several times."""
    state = path.stat()
    return _checksum_of(path, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@cache
def _checksum_of(path: Path, state: tuple[int, ...]) -> str:
    return file_checksum(path)
