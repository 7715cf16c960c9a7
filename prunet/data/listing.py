"""The files of a source: ranges, patterns, folders and links, each within a limit."""

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunet.data.pictures import as_text
from prunet.data.remote import File, is_url, remotes
from prunet.errors import UserError
from prunet.words import brief

MAX_FILES = 100_000  # files that one name may stand for
MAX_AGAIN = 1_000  # repeated visits of folders: links in a circle make endlessly many paths
MAX_PATTERN = 1_000  # characters between two slashes of a pattern: the time to match grows with their square

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def source_paths(source: Source) -> list[File]:
    """Lists the files and folders of a source, and files behind URLs.

    Raises:
        UserError: a list is empty, a file is missing, or a range or pattern has more than `MAX_FILES` files.
    """
    items = _items(source)
    if not items:
        raise UserError("the list of picture sources is empty: name a folder, .tar shards or .parquet files")
    texts = [os.path.expanduser(os.fspath(item)) for item in items]
    return [path for text in texts for name in _ranges(text) for path in _glob(name)]


def source_name(source: Source) -> str:
    """Returns the name of a source for messages; a list is named by its first item."""
    first, *others = _items(source)
    return f"{first} and {len(others)} more" if others else str(first)


def _items(source: Source) -> list[str | os.PathLike[str]]:
    return [source] if isinstance(source, str | os.PathLike) else list(source)


def _ranges(text: str) -> Iterator[str]:
    """Expands `a-{08..10}.tar` as a shell does."""
    if os.path.exists(text):
        return iter([text])
    texts = re.split(r"\{\d+\.\.\d+\}", text)
    ends = re.findall(r"\{(\d+)\.\.(\d+)\}", text)
    short = all(len(end) < 19 for pair in ends for end in pair)  # int() refuses thousands of digits
    spans = [range(int(first), int(last) + 1) for first, last in ends] if short else []
    if not short or not all(spans) or math.prod(map(len, spans)) > MAX_FILES:
        raise UserError(f"{brief(text, 300)}: the range must count up, over at most {MAX_FILES:,} files")
    widths = [max(map(len, pair)) if "0" in (pair[0][0], pair[1][0]) else 1 for pair in ends]
    return (
        texts[0] + "".join(f"{n:0{width}d}{rest}" for n, width, rest in zip(numbers, widths, texts[1:], strict=True))
        for numbers in itertools.product(*spans)
    )


def _glob(text: str) -> Sequence[File]:
    if is_url(text):
        return remotes(text)
    if os.path.exists(text):  # checked first, because a file may have [brackets] in its name
        return [Path(text)]
    if not glob.has_magic(text):
        raise UserError(f"{brief(text, 300)}: no such file or folder")
    if not (found := sorted(_matches(text))):
        raise UserError(f"{brief(text, 300)}: no file matches this pattern; fix the pattern or the folder")
    return [Path(name) for name in found]


def _matches(pattern: str) -> set[str]:
    """Matches part by part, because `glob.glob` makes endless names from links that lead in a circle."""
    names = {""}
    for part in Path(pattern).parts:
        if len(part) > MAX_PATTERN:
            return set()  # no file has such a long name
        if part == "**":
            folders = (name for name in names if os.path.isdir(name or "."))
            found = (os.path.join(name, under) for name in folders for under, _ in walk(Path(name)))
        elif glob.has_magic(part):
            found = (path for name in names for path in glob.iglob(os.path.join(glob.escape(name), part)))
        else:
            found = (path for name in names if os.path.lexists(path := os.path.join(name, part)))
        names = set(itertools.islice(found, MAX_FILES + 1))
        if len(names) > MAX_FILES:
            raise UserError(f"{brief(pattern, 300)}: matches more than {MAX_FILES:,} files or folders; name fewer")
    return names


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder below `root`, its file names) in sorted order, without hidden names.

    Folders are "" or end in a slash. Links are followed, but not in a circle.

    Raises:
        UserError: a folder cannot be listed, or links lead to the same folders more than `MAX_AGAIN` times.
    """
    seen: set[tuple[int, int]] = set()
    again = 0
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while todo:  # not recursive: folders can be thousands deep
        under, above = todo.pop()
        folder = root / under
        try:
            status = os.stat(folder)
            if (this := (status.st_dev, status.st_ino)) in above:
                continue
            entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{brief(folder, 300)}: this folder cannot be listed ({error.strerror})") from None
        again += this in seen
        seen.add(this)
        if again > MAX_AGAIN:
            many = f"links in it lead to the same folders more than {MAX_AGAIN:,} times"
            raise UserError(f"{brief(root, 300)}: {many}; remove those that lead in a circle")
        folders = [entry.name for entry in entries if _is_folder(entry)]
        yield under, sorted({entry.name for entry in entries}.difference(folders))
        todo.extend((f"{under}{name}/", (*above, this)) for name in reversed(folders))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `entry.is_dir()` alone would raise for a link to itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def labels(paths: Sequence[File]) -> list[str]:
    """Returns a label for each file: its name, or its path below the common folder if two files have the same name.

    Raises:
        UserError: a file is given twice.
    """
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        above = os.path.commonpath([path.absolute().parent for path in paths])
        names = [path.absolute().relative_to(above).as_posix() for path in paths]
    most, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{most}: given twice among the picture sources; give each file once")
    return [as_text(name) for name in names]
