"""Sources of pictures: folders, tar shards, Parquet, saved datasets and the Hub, each as one deterministic stream.
Shards and Parquet may lie behind URLs.

Damage does not stop the stream if reading can continue; a truncated shard becomes a broken picture with the shard's
name. A mistake in a list of captions (bad JSON, a missing column, a path outside the folder) is a `UserError` with file
and line, and `check_source` finds it before anything expensive. Only keys stay in memory (those of a folder's metadata,
or of one shard).
"""

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path

from prunet.data.captions import CAPTION_FILES, CAPTION_LISTS, Columns, caption_file, entries
from prunet.data.listing import Source, labels, source_name, source_paths, walk
from prunet.data.pictures import (
    PICTURE_FILES,
    BrokenPicture,
    Picture,
    as_text,
    broken_picture,
    extra,
    formats,
    make_picture,
    reason_of,
)
from prunet.data.rows import read_hub, read_parquet, read_saved, saved_dataset
from prunet.data.shards import SHARDS, read_shard
from prunet.errors import UserError

LOOK = 10_000  # samples among which `check_source` looks for a usable one


def read_pictures(
    source: Source, *, image_column: str = "image", caption_column: str | None = None
) -> Iterator[Picture]:
    """Reads every sample of a source, always in the same order. A source is

    - a folder with `metadata.jsonl`, `.csv` or `.parquet` that has the column `file_name` and a caption column: the
      listed pictures are read, and consecutive rows of one picture are its captions;
    - a folder with `cat.txt` (or `cat.caption`) beside `cat.png`: each line is a caption;
    - WebDataset shards: `a.tar`, `dir/train-*.tar`, `train-{0000..0003}.tar` or a list of these; also by URL
      (`https://`, `s3://`, `hf://` and others that fsspec reads);
    - `.parquet` files, named in the same ways; a folder that `datasets` saved (`save_to_disk`; from several splits
      `train` is read; for another split, give its folder); or `owner/name[:split]` of the Hub. These need
      `prunet[data]`.

    The columns are those of the metadata, of a shard's .json, or of Parquet. Keys begin with the file's name, or with
    its path below the common folder if two files have the same name.

    Raises:
        UserError: there is no such source, a package is missing, or (while reading) a list of captions has a mistake.
    """
    files = picture_files(source, image_column=image_column, caption_column=caption_column)
    return chain.from_iterable(pictures for _, pictures in files)


def picture_files(
    source: Source, *, image_column: str = "image", caption_column: str | None = None
) -> list[tuple[str, Iterator[Picture]]]:
    """Returns (name, samples) of each file; a folder or dataset counts as one file. Files are opened only when read."""
    columns = image_column, caption_column
    if isinstance(source, str) and is_hub_id(source):
        return [(source, read_hub(source, columns))]
    paths = source_paths(source)
    if len(paths) == 1 and isinstance(folder := paths[0], Path) and folder.is_dir():
        if saved := saved_dataset(folder):
            return [("", read_saved(saved, columns))]
        return [("", _read_folder(folder, _lists(folder), columns))]
    names = labels(paths)
    if all(path.name.lower().endswith(SHARDS) for path in paths):
        return list(zip(names, map(partial(read_shard, columns), paths, names), strict=True))
    if all(path.suffix.lower() == ".parquet" for path in paths):
        extra("pyarrow.parquet")
        return list(zip(names, map(partial(read_parquet, columns), paths, names), strict=True))
    what = "pictures come from one folder, or from .tar shards, or from .parquet files"
    raise UserError(f"{paths[0]}{' ...' if len(paths) > 1 else ''}: {what}; name one of these")


def check_source(source: Source, *, image_column: str = "image", caption_column: str | None = None) -> None:
    """Refuses a source with nothing to read. Decodes one picture, and parses all metadata files to their end.

    Raises:
        UserError: there is no usable picture, or a list of captions has a mistake.
    """
    pictures = read_pictures(source, image_column=image_column, caption_column=caption_column)
    unusable, why = 0, f"no pictures here ({', '.join(formats())})"
    for picture in islice(pictures, LOOK):
        try:
            picture.open()
            break
        except BrokenPicture as error:
            why = why if unusable else f"no usable picture here; the first one, {error}"
            unusable += 1
    else:
        name = source_name(source)
        instead = (
            "give pictures with captions, name the .tar or .parquet files, or let the teacher draw a list of prompts"
        )
        raise UserError(f"{name}: {why}; {instead}")
    paths = [] if isinstance(source, str) and is_hub_id(source) else source_paths(source)
    if len(paths) == 1 and isinstance(paths[0], Path) and _lists(paths[0]):
        for _ in pictures:  # finds a mistake in line 90,000 now, not hours later
            pass


def is_hub_id(text: str) -> bool:
    """Returns whether a source is the name of a dataset of the Hub."""
    is_file = text.lower().endswith((*SHARDS, *PICTURE_FILES, ".parquet", ".jsonl", ".csv", ".zip"))
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", text) is not None
    return is_id and not is_file and not os.path.exists(text)


# -- folders


def _lists(root: Path) -> dict[str, str]:
    """Maps each folder below `root` that has a caption list to the list's name."""
    lists: dict[str, str] = {}
    for under, names in walk(root) if root.is_dir() else ():
        found = [name for name in CAPTION_LISTS if name in names]
        if len(found) > 1:
            raise UserError(f"{root / under}: {' and '.join(found)} in one folder; keep one of them")
        if found:
            lists[under] = found[0]
    return lists


def _read_folder(root: Path, lists: dict[str, str], columns: Columns) -> Iterator[Picture]:
    """Reads a folder. A caption list covers its folder and those below; elsewhere captions are beside the pictures."""
    if columns[1] is not None and not lists:
        named = f"no {' or '.join(CAPTION_LISTS)} to find column {columns[1]} in; leave caption_column out"
        raise UserError(f"{root}: {named}")
    listed = None  # the highest folder above it that has a list
    seen: set[str] = set()
    for under, names in walk(root):
        if listed is None or not under.startswith(listed):
            listed = under if under in lists else None
        if under in lists:
            yield from _read_list(root, under, lists[under], columns, seen)
        elif listed is None:
            yield from _read_beside(root / under, under, names, columns[1])


def _read_beside(folder: Path, under: str, names: Sequence[str], column: str | None) -> Iterator[Picture]:
    texts = {Path(name).stem + Path(name).suffix.lower(): folder / name for name in names}
    pictures = [name for name in names if name.lower().endswith(PICTURE_FILES)]
    stems = {Path(name).stem for name in pictures}
    for name in names:
        path, key = Path(name), as_text(under + name)
        beside = [text for ending in CAPTION_FILES if (text := texts.get(path.stem + ending))]
        if path.suffix.lower() in PICTURE_FILES:
            yield make_picture(key, *_captions_beside(path.stem, beside, column), folder / name)
        elif beside and folder / name not in beside and path.stem not in stems:
            yield broken_picture(key, f"has a caption, but not the ending of a picture ({' '.join(PICTURE_FILES)})")


def _captions_beside(stem: str, beside: Sequence[Path], column: str | None) -> tuple[tuple[str, ...], str]:
    """Returns (captions, why there are none)."""
    if column is not None:
        return (), f"no caption: no list of captions to find column {column} in"
    why = f"no caption: no {' or '.join(CAPTION_LISTS)}, and nothing in a {as_text(stem)}.txt beside it"
    try:
        return next(filter(None, (caption_file(text) for text in beside if text.is_file())), ()), why
    except (OSError, ValueError) as error:
        return (), f"no caption: its text file cannot be read ({reason_of(error)})"


def _read_list(root: Path, under: str, name: str, columns: Columns, seen: set[str]) -> Iterator[Picture]:
    folder, path = root / under, root / under / name
    for file, rows in groupby(entries(path, columns), key=lambda entry: entry[1]):
        lines, _, captions = zip(*rows, strict=True)
        if (key := as_text(under + file)) in seen:
            raise UserError(f"{path}, {lines[0]}: {file} was listed before; put its rows next to each other")
        seen.add(key)
        every = tuple(chain.from_iterable(captions))
        yield make_picture(key, every, f"no caption in {as_text(under + name)}, {lines[0]}", folder / file)
