"""Where pictures come from: folders, tar shards, Parquet files and the Hub, each as one deterministic stream.

Whatever can be read past does not stop the stream; a shard that is cut off is a broken picture under its own name. A
mistake in a list of captions (bad JSON, no such column, a path out of the folder) is a `UserError` with file and line,
and `check_source` finds it before the expense. Of what was read only keys are remembered (those of a folder's
metadata, or of one shard).
"""

import csv
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, groupby, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from prunet.errors import UserError
from prunet.pictures import (
    MAX_FILE_MIB,
    BrokenPicture,
    Picture,
    as_text,
    broken_picture,
    caption_lines,
    captions_of,
    extra,
    make_picture,
    one_line,
)

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences")
CAPTION_LISTS = ("metadata.jsonl", "metadata.csv")
CAPTION_FILES = (".txt", ".caption")
PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
SHARD_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SHARDS = (".tar", ".tar.gz", ".tgz")
LOOK = 10_000  # samples in which `check_source` looks for a usable one; the first will do, mostly

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Columns = tuple[str, str | None]  # of the picture, and of the caption where the user named one


def read_pictures(
    source: Source, *, image_column: str = "image", caption_column: str | None = None
) -> Iterator[Picture]:
    """Every sample of the source, always in the same order. A source is

    - a folder with `metadata.jsonl` or `metadata.csv`, which has `file_name` and a caption column: the
      pictures listed are read, consecutive rows of one picture are its captions;
    - a folder with `cat.txt` (or `cat.caption`) beside `cat.png`: each line is a caption;
    - WebDataset shards: `a.tar`, `dir/train-*.tar`, `train-{0000..0003}.tar` or a list of these;
    - `.parquet` files, named in the same ways, or `owner/name[:split]` of the Hub; these want `prunet[data]`.

    The columns are those of the metadata, of a shard's .json, of Parquet. Keys begin with the file's name, or
    with its path below the common folder where two files have one name.
    """
    columns = image_column, caption_column
    if isinstance(source, str) and _is_hub_id(source):
        return _read_hub(source, columns)
    paths = source_paths(source)
    if len(paths) == 1 and paths[0].is_dir():
        return _read_lists(paths[0], columns) if _lists(paths[0]) else _read_beside(paths[0], columns)
    labels = _labels(paths)
    if all(path.name.lower().endswith(SHARDS) for path in paths):
        return chain.from_iterable(map(partial(_read_shard, columns), paths, labels))
    if all(path.suffix.lower() == ".parquet" for path in paths):
        read = partial(_read_parquet, extra("pyarrow.parquet"), columns)
        return chain.from_iterable(map(read, paths, labels))
    what = "pictures come from one folder, or from .tar shards, or from .parquet files"
    raise UserError(f"{paths[0]}{' ...' if len(paths) > 1 else ''}: {what}; name one of these")


def check_source(source: Source, *, image_column: str = "image", caption_column: str | None = None) -> None:
    """Fail if nothing can be read there. Decodes one picture and parses the whole of each metadata file."""
    pictures = read_pictures(source, image_column=image_column, caption_column=caption_column)
    unusable, why = 0, "no pictures here"
    for picture in islice(pictures, LOOK):
        try:
            picture.open()
            break
        except BrokenPicture as error:
            why = why if unusable else f"no usable picture here; the first one, {error}"
            unusable += 1
    else:
        raise UserError(f"{source}: {why}; give pictures with captions, or name the .tar or .parquet files")
    paths = [] if isinstance(source, str) and _is_hub_id(source) else source_paths(source)
    if len(paths) == 1 and _lists(paths[0]):
        for _ in pictures:  # a mistake in line 90,000 shows now, not hours later
            pass


# -- naming the source ---------------------------------------------------------------------------------------


def _is_hub_id(text: str) -> bool:
    is_file = text.lower().endswith((*SHARDS, *PICTURE_FILES, ".parquet", ".jsonl", ".csv", ".zip"))
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", text) is not None
    return is_id and not is_file and not os.path.exists(text)


def source_paths(source: Source) -> list[Path]:
    items = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not items:
        raise UserError("the list of picture sources is empty: name a folder, .tar shards or .parquet files")
    texts = [os.path.expanduser(os.fspath(item)) for item in items]
    return [path for text in texts for name in _ranges(text) for path in _glob(name)]


def _ranges(text: str) -> list[str]:
    """`a-{08..10}.tar` as a shell expands it."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not match or os.path.exists(text):
        return [text]
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < 100_000:
        raise UserError(f"{text}: the range must count up, over fewer than 100,000 files")
    digits = max(len(first), len(last)) if "0" in (first[0], last[0]) else 1
    middles = (f"{number:0{digits}d}" for number in range(int(first), int(last) + 1))
    return [name for m in middles for name in _ranges(text[: match.start()] + m + text[match.end() :])]


def _glob(text: str) -> list[Path]:
    if os.path.exists(text):  # before anything else: it may have [brackets] in its name
        return [Path(text)]
    if not glob.has_magic(text):
        raise UserError(f"{text}: no such file or folder{'; download it first' if '://' in text else ''}")
    if not (found := sorted(glob.glob(text, recursive=True))):
        raise UserError(f"{text}: no file matches this pattern; mend the pattern or the folder")
    return [Path(name) for name in found]


def _labels(paths: list[Path]) -> list[str]:
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        above = os.path.commonpath([path.absolute().parent for path in paths])
        labels = [path.absolute().relative_to(above).as_posix() for path in paths]
    for label in labels if len(set(labels)) < len(labels) else ():
        if labels.count(label) > 1:
            raise UserError(f"{label}: named twice among the picture sources; name each file once")
    return [as_text(label) for label in labels]


# -- folders -------------------------------------------------------------------------------------------------


def _walk(root: Path, under: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """(folder, its file names) in sorted order, less hidden names. Links are followed, but in no circle."""
    folder, real = root / under, os.path.realpath(root / under)
    if real in above:
        return
    try:
        entries = sorted((e for e in os.scandir(folder) if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be listed ({error.strerror})") from None
    yield under, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from _walk(root, f"{under}{entry.name}/", (*above, real))


def _lists(root: Path) -> list[tuple[str, str]]:
    """(folder, name) of its caption lists."""
    walk = _walk(root) if root.is_dir() else ()
    lists = [(under, name) for under, names in walk for name in CAPTION_LISTS if name in names]
    if len({under for under, _ in lists}) < len(lists):
        raise UserError(f"{root}: {' and '.join(CAPTION_LISTS)} in one folder; keep one of them")
    return lists


def _read_beside(root: Path, columns: Columns) -> Iterator[Picture]:
    if columns[1] is not None:
        raise UserError(f"{root}: no metadata.jsonl or .csv to find column {columns[1]} in; leave it unnamed")
    for under, names in _walk(root):
        texts = {Path(name).stem + Path(name).suffix.lower(): root / under / name for name in names}
        for name in (name for name in names if name.lower().endswith(PICTURE_FILES)):
            beside = [texts.get(Path(name).stem + suffix) for suffix in CAPTION_FILES]
            captions: tuple[str, ...] = ()
            why = f"no caption: no metadata.jsonl or .csv, and nothing in a {Path(name).stem}.txt beside it"
            try:
                read = (caption_lines(text.read_bytes()) for text in beside if text and text.is_file())
                captions = next(filter(None, read), ())
            except (OSError, ValueError) as error:
                why = f"no caption: its text file cannot be read ({one_line(error)})"
            yield make_picture(as_text(under + name), captions, why, root / under / name)


def _read_lists(root: Path, columns: Columns) -> Iterator[Picture]:
    seen: set[str] = set()
    for under, name in _lists(root):
        folder, where = root / under, f"{as_text(under + name)}, line"
        for file, rows in groupby(_entries(folder / name, columns), key=lambda entry: entry[1]):
            lines, _, captions = zip(*rows, strict=True)
            if (key := as_text(under + file)) in seen:
                again = f"{file} was listed before; put its rows next to each other"
                raise UserError(f"{folder / name}, line {lines[0]}: {again}")
            seen.add(key)
            every = tuple(chain.from_iterable(captions))
            yield make_picture(key, every, f"no caption in {where} {lines[0]}", folder / file)


def _entries(path: Path, columns: Columns) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, picture relative to the list, captions) of every row."""
    caption_columns: tuple[str, ...] = ()
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        caption_columns = caption_columns or _caption_columns(where, list(row), columns[1])
        name = row.get("file_name") or row.get(columns[0])
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: no file_name; every row names its picture in that column")
        file = os.path.normpath(name.replace("\\", "/"))  # written on Windows, read anywhere
        if file.startswith(("/", "../")) or file in ("..", ".") or re.match("[A-Za-z]:/", file):
            raise UserError(f"{where}: {name} is not inside the folder; name pictures relative to {path.name}")
        yield line, file.replace(os.sep, "/"), captions_of(row, caption_columns)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        for line, text in enumerate(_text_lines(path), 1):
            if text.strip():
                yield line, _json_object(text, f"{path}, line {line}")
        return
    reader = csv.DictReader(_text_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:
                fields = "more fields than the header has; quote captions that hold commas"
                raise UserError(f"{path}, line {reader.line_num}: {fields}")
            yield reader.line_num, row
    except csv.Error as error:  # in the row after the last good one, though it may show at the end of the file
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}; mend the quotes there") from None


def _text_lines(path: Path) -> Iterator[str]:
    line = 0
    try:
        with open(path, "rb") as file:
            for line, data in enumerate(file, 1):
                yield data.decode("utf-8-sig" if line == 1 else "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {line}: cannot be read as UTF-8 text ({one_line(error)})") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        if isinstance(row := json.loads(text), dict):
            return row
    except (ValueError, RecursionError):
        pass
    raise UserError(f'{where}: not a JSON object such as {{"file_name": "a.png", "text": "a cat"}}')


def _caption_columns(where: str, columns: Sequence[str], named: str | None) -> tuple[str, ...]:
    wanted = CAPTION_COLUMNS if named is None else (named,)
    if not (found := tuple(column for column in wanted if column in columns)):
        has = f"it has {', '.join(map(str, columns))}"
        raise UserError(f"{where}: no caption column {' or '.join(wanted)}; {has}: name one with caption_column")
    return found


# -- tar shards ----------------------------------------------------------------------------------------------


def _read_shard(columns: Columns, path: Path, label: str) -> Iterator[Picture]:
    seen: set[str] = set()
    for name, files in _samples(path):
        if isinstance(files, Exception):
            yield broken_picture(label, f"shard cut off or damaged after {len(seen)} samples ({one_line(files)})")
            return
        key, number = f"{label}/{as_text(name)}", 1
        while key in seen:  # a name that comes again later in the shard is another sample
            number += 1
            key = f"{label}/{as_text(name)}#{number}"
        seen.add(key)
        picture = next((data for suffix, data in files.items() if suffix in SHARD_PICTURES), None)
        if picture is None:
            yield broken_picture(key, f"no picture ({' '.join(SHARD_PICTURES)}) in this sample")
        else:
            yield make_picture(key, *_sample_captions(files, columns[1]), file=picture)


def _sample_captions(files: dict[str, bytes], column: str | None) -> tuple[tuple[str, ...], str]:
    """(captions, why there are none); a named column is looked up in the .json alone."""
    why = f"no caption ({' '.join(CAPTION_FILES)} .json)" if column is None else f"no {column!r} in its .json"
    for suffix in (*CAPTION_FILES, ".json") if column is None else (".json",):
        try:
            captions: tuple[str, ...] = ()
            if suffix in files and suffix != ".json":
                captions = caption_lines(files[suffix])
            elif suffix in files:
                row = _json_object(files[suffix].decode("utf-8-sig"), suffix)
                captions = captions_of(row, CAPTION_COLUMNS if column is None else (column,))
            if captions:
                return captions, ""
        except (UnicodeDecodeError, UserError) as error:
            why = f"no caption: its {suffix} cannot be read ({one_line(error)})"
    return (), why


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes] | Exception]]:
    """Neighbours of one name up to its first dot, as in WebDataset; last, if so, what broke the shard."""
    current, damage = "", None
    files: dict[str, bytes] = {}
    try:
        for member, data in _members(path):
            folder, slash, base = member.rpartition("/")
            stem, dot, suffix = base.partition(".")
            name, suffix = folder + slash + stem, (dot + suffix).lower()
            if files and (name != current or suffix in files):
                yield current, files
                files = {}
            current, files[suffix] = name, data
    except Exception as error:  # tarfile, gzip and zlib have one each for a file that is cut off
        damage = error
    if files:
        yield current, files
    if damage is not None:
        yield "", damage


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:*") as tar:
        while (member := tar.next()) is not None:
            name = member.name.removeprefix("./")
            wanted = name.lower().endswith((*SHARD_PICTURES, *CAPTION_FILES, ".json"))
            if wanted and not os.path.basename(name).startswith(".") and member.isreg():
                file = tar.extractfile(member)
                yield name, file.read(min(member.size, (MAX_FILE_MIB << 20) + 1)) if file else b""
            vars(tar)["members"].clear()  # it would keep the headers of all of them
        # tarfile passes over a missing end, and over a broken header, in silence.
        if tar.fileobj is not None and (tar.fileobj.seek(tar.offset), tar.fileobj.read(512))[1] != bytes(512):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset:,}")


# -- Parquet and the Hub -------------------------------------------------------------------------------------


def _read_parquet(parquet: ModuleType, columns: Columns, path: Path, label: str) -> Iterator[Picture]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            captions = _table_columns(str(path), file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=16, columns=[columns[0], *captions]):
                for row in batch.to_pylist():
                    yield _from_row(f"{label}/{number:08d}", row, columns[0], captions)
                    number += 1
    except (OSError, ValueError) as error:  # what pyarrow's errors derive from
        yield broken_picture(label, f"file cut off or damaged after {number} rows ({one_line(error)})")


def _read_hub(source: str, columns: Columns) -> Iterator[Picture]:
    datasets = extra("datasets", f"{source}: no such folder here; ")
    name, _, split = source.partition(":")
    split = split or "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # no network, name, split, right to read it, ...
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{source}: no such folder, nor can owner/name:split be read from the Hub ({why})") from None
    captions = _table_columns(source, names, columns)
    rows = rows.select_columns([columns[0], *captions]).cast_column(columns[0], datasets.Image(decode=False))
    keys = map(f"{name}/{split}/{{:08d}}".format, count())
    return (_from_row(key, row, columns[0], captions) for key, row in zip(keys, rows, strict=False))


def _table_columns(where: str, names: list[str], columns: Columns) -> tuple[str, ...]:
    if columns[0] not in names:
        has = f"it has {', '.join(names)}"
        raise UserError(f"{where}: no picture column {columns[0]}; {has}: name one with image_column")
    return _caption_columns(where, names, columns[1])


def _from_row(key: str, row: dict[str, Any], image_column: str, captions: tuple[str, ...]) -> Picture:
    value = row[image_column]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not isinstance(data, bytes):
        # A row may name any path at all; only what the Hub itself serves is followed.
        if not isinstance(path, str) or not re.search("(^|::)hf://", path):
            return broken_picture(key, f"no picture in column {image_column}, or its path alone")
        data = path
    return make_picture(key, captions_of(row, captions), f"no caption in column {' or '.join(captions)}", data)


def has_files(source: Source) -> bool:
    """Whether files of a source can be found here."""
    try:
        return bool(source_paths(source))
    except UserError:
        return False


def source_files(source: Source) -> list[tuple[str, int | str]]:
    """The local files of a source: names and sizes of pictures and shards, and what the lists of captions say.

    This decides whether a source is still the same; it is not worth reading every picture for.
    """
    if isinstance(source, str) and _is_hub_id(source):
        return [(source, 0)]
    out: list[tuple[str, int | str]] = []
    for root in source_paths(source):
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in files:
            if file.is_file():
                name = str(file.relative_to(root)) if root.is_dir() else file.name
                text = file.suffix.lower() in (*CAPTION_FILES, ".jsonl", ".csv")
                out.append((name, hashlib.sha256(file.read_bytes()).hexdigest() if text else file.stat().st_size))
    return out
