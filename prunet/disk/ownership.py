"""Where prunet may write: into folders that it made, or that are empty or absent, and only one process at a time.

A folder that prunet made contains a seal (`prunet.disk.seals`). A process that works in a folder holds the folder's
lock.
"""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from mimetypes import MimeTypes
from pathlib import Path

from prunet.disk.files import aside, clear_errors, new_file
from prunet.disk.seals import SEAL, changed, files_in, read_seal, seal_text
from prunet.errors import UserError

LOCK = ".prunet.lock"
#: Folders of versions without seals: a folder is of a kind if it contains all names of one of the kind's lists.
UNSEALED = {
    "run": (("recipe.yaml", "plan.json", "steps.json"),),
    "cache": (("spec.json", "unconditional.safetensors"), ("spec.json", "cache.json")),
    "ablation": (("ablation.json", "ablation.md"),),
    "measurement": (("measures.json",), ("pictures/spec.json",)),
    "bench": (("bench.json", "bench.md"),),
}

#: Parts of a run folder, and the kind that `-o` of a command may write there; None: no kind.
_RUNS = {
    r"student": "build",
    r"stage-\d+/unet": "stage",
    r"cache(-paths)?(-\d+)?": "cache",
    r"pipeline": "export",
    r"student(-[\w-]+)?\.config": "configs",
    r"student(-[\w-]+)?\.(safetensors|gguf)": "single file",
    r"report\.html": "report",
    r"measured/[^/]+": "measurement",
    r"evaluation": None,
    r"recipe\.yaml": None,
    r"plan\.json": None,
    r"steps\.json": None,
}

_FILES = MimeTypes()  # Python's own table, because the tables of systems differ

# -- where prunet may write


def kind_of(folder: Path) -> str | None:
    """Returns the kind of a folder that prunet made (`run`, `cache`, `student`, ...); None for any other folder."""
    if seal := read_seal(folder):
        return str(seal.get("what"))
    for kind, lists in UNSEALED.items():
        if any(all((folder / name).exists() for name in names) for names in lists):
            return kind
    return None


def check_place(folder: Path, what: str, option: str, sources: Iterable[Path] = ()) -> None:
    """Refuses an output folder for a `what`, unless it is absent, empty, or a `what` that prunet made.

    `option`: the option that names the folder. `sources`: teachers and data; the folder may not be, lie in or contain
    one of them.

    Raises:
        UserError: the folder is something else; the message says what.
    """
    place = resolve(folder, option, sources)
    _check_around(place, what, folder, option)
    if place.exists() and not place.is_dir():
        raise UserError(f"{option}: {folder} is a file: give a folder")
    if not place.exists() and _FILES.guess_type(place.name)[0]:
        raise UserError(f"{option}: {folder} has the name of a file, but will be a folder: give a folder's name")
    ours = (LOCK, aside(place / SEAL).name)  # a killed process may leave these without the seal
    inside = [path.name for path in place.iterdir() if path.name not in ours] if place.is_dir() else []
    if not inside:
        return
    kind = kind_of(place)
    if kind is None:
        shown = ", ".join(sorted(inside)[:3])
        raise UserError(
            f"{option}: {folder} contains files that prunet did not make ({shown}): give a new or empty folder"
        )
    if kind != what:
        raise UserError(f"{option}: {folder} is {_a(kind)}, not {_a(what)} that could be replaced: give another folder")
    seal = read_seal(place)
    if seal and "files" in seal:  # the folder will be replaced as a whole
        extra = sorted(set(files_in(place)) - seal["files"].keys())
        if wrong := f"{folder / extra[0]}: not made by prunet" if extra else changed(folder, seal):
            raise UserError(f"{option}: {wrong}: move it away, or give another folder")


def check_file(
    path: Path, what: str, option: str, is_ours: Callable[[Path], bool], sources: Iterable[Path] = ()
) -> None:
    """Refuses an output file for a `what` that exists, unless `is_ours`, or that would lie in a model or a cache.

    Raises:
        UserError: the place is not free; the message says what is there.
    """
    place = resolve(path, option, sources)
    if place.is_dir():
        raise UserError(f"{option}: {path} is a folder: give a file")
    _check_around(place, what, path, option)
    if place.exists() and not is_ours(place):
        raise UserError(
            f"{option}: {path} exists, and is not an unchanged {what} of prunet: delete it first, or give another name"
        )


def _check_around(place: Path, what: str, shown: Path, option: str) -> None:
    """Refuses a place in a model, a cache or a folder that prunet wrote as a whole.

    In a run folder, it refuses the parts of the run, except for a `what` that belongs there.
    """
    for parent in place.parents:
        if (parent / "model_index.json").is_file():
            raise UserError(f"{option}: {shown} lies in {parent}, which is a model: give another folder")
        if (kind := kind_of(parent)) == "cache" or (kind and "files" in (read_seal(parent) or {})):
            raise UserError(f"{option}: {shown} lies in {parent}, which is {_a(kind)}: give another folder")
        if kind == "run" and not _has_room(str(place.relative_to(parent)), what):
            raise UserError(f"{option}: {shown} is a name for the run {parent} itself: give another name")


def _has_room(place: str, what: str) -> bool:
    """Returns whether a `what` may be written at a place in a run folder: as a part of the run, or beside its parts."""
    first = place.partition("/")[0]
    is_part = any(re.fullmatch(name.partition("/")[0], first) for name in _RUNS)
    return not is_part or any(re.fullmatch(name, place) and kind == what for name, kind in _RUNS.items())


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} of prunet"


def resolve(path: Path, option: str, sources: Iterable[Path] = ()) -> Path:
    """Returns the path with its links resolved.

    Raises:
        UserError: the path leads nowhere, or is, lies in or contains one of `sources`.
    """
    try:
        place = path.resolve()
        others = {source: source.resolve() for source in sources if source.exists()}
        if any(part.is_symlink() for part in (place, *place.parents)):  # Python 3.13 leaves it as it is
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{option}: {path} leads nowhere ({error}): give another path") from error
    for source, other in others.items():
        if place == other or other in place.parents or place in other.parents:
            how = "is" if place == other else "lies in" if other in place.parents else "contains"
            raise UserError(f"{option}: {path} {how} {source}, which prunet only reads: give another path")
    return place


# -- one process at a time

_held: dict[Path, tuple[int, int]] = {}  # for each folder: file descriptor of its lock, how often this process took it


@contextmanager
def hold(folder: Path, what: str) -> Iterator[None]:
    """Locks a folder as a `what`: other processes cannot write into it until the block, or this process, ends.

    A folder without write permission (a finished run on a read-only mount) is not locked. A new folder is removed if
    the block fails before it writes anything there.

    Raises:
        UserError: another process works in the folder; the message names it.
    """
    key, is_new = folder.resolve(), not folder.exists()
    file, times = _held.get(key) or (_lock(folder, what), 0)
    if file is not None:
        _held[key] = file, times + 1
    try:
        yield
    except BaseException:
        if is_new:
            _remove_empty(folder)
        raise
    finally:
        if file is not None:
            _, times = _held.pop(key, (file, 0))  # 0: in a forked child
            if times > 1:
                _held[key] = file, times - 1
            elif times:
                os.close(file)


def _remove_empty(folder: Path) -> None:
    """Removes a locked folder if nothing but the seal and the lock is in it."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {SEAL, LOCK}:
        with suppress(OSError):
            for name in (SEAL, LOCK):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _lock(folder: Path, what: str) -> int | None:
    if folder.is_dir() and not os.access(folder, os.W_OK):
        return None
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%F %T},"
            os.ftruncate(file, 0)
            os.pwrite(file, holder.encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise UserError(f"{folder}: {holder} works in it: wait until that process ends, or end it") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                os.close(file)
                raise
        if not _is_open(file, folder / LOCK):  # another process has removed the folder in the meantime
            os.close(file)
            return _lock(folder, what)
        if not (folder / SEAL).exists():  # only now: processes that start together would write it at once
            try:
                with new_file(folder / SEAL) as part:
                    part.write_text(seal_text(what), encoding="utf-8")
            except BaseException:
                os.close(file)
                raise
    return file


def _is_open(file: int, path: Path) -> bool:
    """Returns whether an open file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def worker_of(folder: Path) -> str | None:
    """Returns the process that works in a folder, as its lock describes it; None if no process does."""
    try:
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace").rstrip(",") or "another process"
    except OSError:  # no lock, or a file system without locks
        pass
    return None


def _let_go() -> None:
    """Closes the locks in a forked child (a loader of samples), so that they end with the parent."""
    for file, _ in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
