"""The contents of a source: whether its files are here, and a fingerprint of their names and contents.

The fingerprint shows whether a source is still the same. It covers every byte, because a shard can be packed again, or
a picture painted over, at the same size. It does not depend on where the files are. All files are read for it, but only
once: a cache keeps the state of its files (size, times, inode) in `source.json`, and while this state is the same, the
files are not read again.

Files behind URLs are not read for it; their names, sizes and marks (such as `ETag`) count instead.
"""

import os
from pathlib import Path

from prunet.console import progress
from prunet.data.cache import read_spec
from prunet.data.captions import CAPTION_FILES, CAPTION_LISTS
from prunet.data.listing import Source, source_paths, walk
from prunet.data.remote import Remote, marks
from prunet.data.rows import picture_paths
from prunet.data.sources import is_hub_id
from prunet.disk.files import read_label, write_json
from prunet.errors import UserError
from prunet.hashing import file_hash, json_hash

KNOWN = "source.json"
SLOW = 1 << 30  # bytes from which on a progress bar is shown
Files = list[tuple[str, Path]]
known_here: dict[str, str] = {}  # fingerprints by state of the files, in this process


def has_files(source: Source) -> bool:
    """Returns whether a source has files on this machine."""
    try:
        return any(isinstance(path, Path) for path in source_paths(source))
    except UserError:
        return False


def source_fingerprint(source: Source, made: Path | None = None, image_column: str = "image") -> str:
    """Returns a hash of the names and contents of a source's files; for a dataset of the Hub, only of its name.

    `made`: the folder of a cache of this source, if there is one; it remembers files that have not changed.
    """
    if isinstance(source, str) and is_hub_id(source):
        return hub_fingerprint(source)
    if remote := [path for path in source_paths(source) if isinstance(path, Remote)]:
        return json_hash([marks(remote), source_files(source, image_column)])
    files = _files(source, image_column)
    state = _state(files)
    if state not in known_here:
        if known := made and _remembered(made, files, state):
            return known
        known_here[state] = json_hash(source_files(source, image_column))
    return known_here[state]


def hub_fingerprint(source: Source) -> str:
    """Returns the fingerprint of a dataset of the Hub."""
    return json_hash([(source, 0)])


def remember(source: Source, made: Path, fingerprint: str, image_column: str = "image") -> None:
    """Writes the state of a source's files into the cache `made`, if they still have `fingerprint`."""
    if has_files(source) and known_here.get(state := _state(_files(source, image_column))) == fingerprint:
        write_json(made / KNOWN, {"state": state, "fingerprint": fingerprint})


def _remembered(made: Path, files: Files, state: str) -> str | None:
    if (made / KNOWN).is_file():
        known = read_label(made / KNOWN, ("state", "fingerprint"))
        return str(known["fingerprint"]) if known["state"] == state else None
    if not (made / "spec.json").is_file():
        return None
    # Older versions identified pictures and shards by their sizes; their caches stay valid.
    by_size = json_hash([(name, _sha256(file) if _is_text(file) else file.stat().st_size) for name, file in files])
    return by_size if read_spec(made)["content"] == by_size else None


def source_files(source: Source, image_column: str = "image") -> list[tuple[str, str]]:
    """Yields the local files of a source: (name, SHA-256 of the contents or why the file cannot be read)."""
    files = _files(source, image_column)
    is_slow = sum(file.stat().st_size for _, file in files) > SLOW
    found = []
    with progress("Checking whether the data changed" if is_slow else "", len(files)) as bar:
        for name, file in files:
            found.append((name, _sha256(file)))
            bar.advance()
    return found


def _files(source: Source, image_column: str) -> Files:
    """Yields (name, file) of all files, also those that Parquet rows refer to; names are relative to the source."""
    found: Files = []
    for root in (path for path in source_paths(source) if isinstance(path, Path)):
        below = (Path(under, name) for under, names in walk(root) for name in names) if root.is_dir() else ()
        found += [(str(name), root / name) for name in sorted(below)] if root.is_dir() else [(root.name, root)]
        if root.is_file() and root.suffix.lower() == ".parquet":
            here = os.path.normpath(root.parent.absolute())
            found += [(str(path.relative_to(here)), path) for path in picture_paths(root, image_column)]
    return [(name, file) for name, file in found if file.is_file()]


def _state(files: Files) -> str:
    found = [(name, file.stat()) for name, file in files]
    return json_hash([(name, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for name, at in found])


def _is_text(file: Path) -> bool:
    return file.name in CAPTION_LISTS or file.suffix.lower() in (*CAPTION_FILES, ".jsonl", ".csv")


def _sha256(file: Path) -> str:
    try:
        return file_hash(file)
    except OSError as error:
        return str(error.strerror)
