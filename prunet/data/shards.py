"""WebDataset shards: tars in which neighbouring files with the same name, up to its first dot, are a sample.

No sample is lost silently: everything in a shard becomes a picture, or a broken picture that says why.
"""

import tarfile
from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from prunet.data.captions import (
    CAPTION_FILES,
    MAX_TEXT,
    Columns,
    caption_columns,
    caption_lines,
    captions_of,
    json_object,
)
from prunet.data.pictures import MAX_FILE_MIB, PICTURE_FILES, Picture, as_text, broken_picture, make_picture, reason_of
from prunet.data.remote import File
from prunet.errors import UserError

SHARDS = (".tar", ".tar.gz", ".tgz")
MAX_HEADER = 1 << 20  # bytes of a name or of a header's extras
AFTER_END = 1 << 20  # bytes after the end mark that are searched for a second tar; padding is about 10 KiB of zeros

EXTRA_HEADERS = (b"x", b"g", b"X", tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
LINK = " (a link)"

Files = dict[str, bytes | None]  # contents by ending, such as ".jpg" or ".txt"; None: not read


def read_shard(columns: Columns, path: File, label: str) -> Iterator[Picture]:
    """Reads the samples of a shard; keys begin with `label`. Damage becomes a last, broken sample."""
    seen: set[str] = set()
    for samples, (name, files) in enumerate(read_samples(path)):
        if isinstance(files, Exception):
            yield broken_picture(label, f"shard cut off or damaged after {samples} samples ({reason_of(files)})")
            return
        picture = next((data for ending, data in files.items() if ending in PICTURE_FILES and data is not None), None)
        dotted = [ending for ending in files if _is_dotted_picture(ending, files, picture is None)]
        if picture is not None:
            key = _new_key(f"{label}/{as_text(name)}", seen)
            yield make_picture(key, *_captions(files, columns[1]), file=picture)
        elif not dotted:
            yield broken_picture(_new_key(f"{label}/{as_text(name)}", seen), _no_picture(files))
        for ending in dotted:
            rule = f"for WebDataset a name ends at its first dot, so this is {ending} of {name.rpartition('/')[2]!r}"
            why = f"{rule}; to read it, remove the other dots from its name and its caption's"
            yield broken_picture(_new_key(f"{label}/{as_text(name + ending)}", seen), as_text(why))


def _new_key(key: str, seen: set[str]) -> str:
    """Adds a number to a key that was used before, because a name that returns later in a shard is another sample."""
    new, number = key, 1
    while new in seen:
        number += 1
        new = f"{key}#{number}"
    seen.add(new)
    return new


def _is_dotted_picture(ending: str, files: Files, alone: bool) -> bool:
    """Returns whether a file is a separate sample with a dot in its name; `.seg.png` beside a picture is not one."""
    stem, _, kind = ending[1:].rpartition(".")
    captioned = any(f".{stem}{text}" in files for text in (*CAPTION_FILES, ".json"))
    return stem != "" and f".{kind}" in PICTURE_FILES and (alone or captioned)


def _no_picture(files: Files) -> str:
    has = ", ".join(ending or "a file without an ending" for ending in list(files)[:5])
    why = f"no picture ({' '.join(PICTURE_FILES)}) in this sample; it has {as_text(has)}"
    links = "; pack files instead of links (tar --dereference --hard-dereference)"
    return why + (links if any(ending.endswith(LINK) for ending in files) else "")


def _captions(files: Files, column: str | None) -> tuple[tuple[str, ...], str]:
    """Returns (captions, why there are none); a column that the user named is looked up only in the .json."""
    why = f"no caption ({' '.join(CAPTION_FILES)} .json)" if column is None else f"no {column!r} in its .json"
    for ending in (*CAPTION_FILES, ".json") if column is None else (".json",):
        if ending + LINK in files:
            why = f"no caption: its {ending} is a link; pack files instead of links"
        if (data := files.get(ending)) is None:
            continue
        try:
            if ending == ".json":
                captions = captions_of(json_object(data, ending), caption_columns(column))
            else:
                captions = caption_lines(data)
            if captions:
                return captions, ""
        except (ValueError, UserError) as error:
            why = f"no caption: its {ending} cannot be read ({reason_of(error)})"
    return (), why


def read_samples(path: File) -> Iterator[tuple[str, Files | Exception]]:
    """Yields (name, files) of each sample of a shard, and at the end the error if it is damaged."""
    current, damage = "", None
    files: Files = {}
    try:
        for name, ending, data in _members(path):
            if files and (name != current or ending in files):
                yield current, files
                files = {}
            current, files[ending] = name, data
    except UserError:  # the network failed; the shard is not damaged
        raise
    except Exception as error:  # tarfile, gzip and zlib each raise their own errors for a truncated file
        damage = error
    if files:
        yield current, files
    if damage is not None:
        yield "", damage


def _members(path: File) -> Iterator[tuple[str, str, bytes | None]]:
    """Yields (name, ending, contents if they may be useful) of all members, except folders and hidden files."""
    if not path.is_file():
        raise OSError("not a file")  # reading a pipe would block
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*", tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            stem, dot, ending = base.partition(".")
            ending = (dot + ending).lower()
            if stem and not member.isdir():
                limit = MAX_FILE_MIB << 20 if ending in PICTURE_FILES else MAX_TEXT
                is_read = member.isreg() and ending in (*PICTURE_FILES, *CAPTION_FILES, ".json")
                contents = tar.extractfile(member) if is_read else None
                data = contents.read(min(member.size, limit + 1)) if contents else None
                yield folder + slash + stem, ending if member.isreg() else ending + LINK, data
            vars(tar)["members"].clear()  # otherwise tarfile keeps the headers of all members
        if tar.fileobj is None:
            return
        # tarfile silently ignores a missing end mark, a broken header, and a second tar after the end mark.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset:,}")
        if tar.fileobj.read(AFTER_END).strip(b"\0"):
            joined = "tars joined by cat, only the first is read; unpack with tar --ignore-zeros and pack again"
            raise tarfile.ReadError(f"more after the end mark at byte {tar.offset:,}: {joined}")


class _Member(tarfile.TarInfo):
    """A header that refuses long names and extra headers, which tarfile would read into memory at any size."""

    @override
    @classmethod
    def frombuf(cls, *args: Any) -> "_Member":
        member: _Member = super().frombuf(*args)
        if member.type in EXTRA_HEADERS and member.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member
