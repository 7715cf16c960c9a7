"""Captions from text files, JSON, columns of tables, and lists in folders (`metadata.jsonl`, ...).

Values that are not captions are dropped here; the reader of a sample reports samples without any. The size of the text
is limited.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prunet.data.pictures import extra, reason_of
from prunet.errors import UserError
from prunet.recipe.prompts import LONGEST_PROMPT

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences")
CAPTION_LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_FILES = (".txt", ".caption")
MAX_TEXT = 4 << 20  # bytes of a caption file, a sample's JSON or a line of a list; parsed JSON takes 30 times as much

Columns = tuple[str, str | None]  # the picture's column, and the caption's if the user named one


def caption_columns(named: str | None) -> tuple[str, ...]:
    """Returns the columns that may contain captions."""
    return CAPTION_COLUMNS if named is None else (named,)


def captions_of(row: dict[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    """Returns the captions of the first column that has any; a column has one string or a list of strings."""
    values = (row.get(column) for column in columns)
    found = (clean_captions(value if isinstance(value, list | tuple) else [value]) for value in values)
    return next(filter(None, found), ())


def caption_lines(data: bytes) -> tuple[str, ...]:
    """Returns the captions in the contents of a text file, one per line.

    Raises:
        ValueError: the contents are not UTF-8, or larger than `MAX_TEXT`.
    """
    return clean_captions(re.split(r"\r\n|\r|\n", _decoded(data)))


def caption_file(path: Path) -> tuple[str, ...]:
    """Returns the captions in a text file, one per line; raises the errors of `caption_lines`."""
    with path.open("rb") as file:
        return caption_lines(file.read(MAX_TEXT + 1))


def clean_captions(values: Iterable[Any]) -> tuple[str, ...]:
    """Strips captions, drops invisible ones, and shortens those above `LONGEST_PROMPT` characters."""
    texts = (value.encode("utf-8", "replace").decode().strip() for value in values if isinstance(value, str))
    # The tokenizer would also cut such a text, but takes seconds. Spaces are not tokens.
    texts = (text if len(text) <= LONGEST_PROMPT else " ".join(text.split())[:LONGEST_PROMPT] for text in texts)
    return tuple(text for text in texts if re.search(r"[^\s\0\u200b-\u200d\u2060\ufeff]", text))


def json_object(data: bytes | str, where: str) -> dict[str, Any]:
    """Parses one JSON object; `where` begins messages.

    Raises:
        UserError: the text is not an object, nested too deeply, not UTF-8, or larger than `MAX_TEXT`.
    """
    try:
        text = data if isinstance(data, str) else _decoded(data)
    except ValueError as error:
        raise UserError(f"{where}: cannot be read as UTF-8 text ({reason_of(error)})") from None
    try:
        if isinstance(row := json.loads(text), dict):
            return row
    except (ValueError, RecursionError):
        pass
    raise UserError(f'{where}: not a JSON object such as {{"file_name": "a.png", "text": "a cat"}}')


def _decoded(data: bytes) -> str:
    if len(data) > MAX_TEXT:
        raise ValueError(f"larger than {MAX_TEXT >> 20} MiB")
    return data.decode("utf-8-sig")


def check_columns(where: str, columns: Sequence[str], named: str | None) -> tuple[str, ...]:
    """Returns the caption columns among `columns`.

    Raises:
        UserError: there is no caption column.
    """
    wanted = caption_columns(named)
    if not (found := tuple(column for column in wanted if column in columns)):
        has = f"it has {', '.join(map(str, columns))}"
        raise UserError(f"{where}: no caption column {' or '.join(wanted)}; {has}: name one with caption_column")
    return found


# -- lists of captions in a folder


def entries(path: Path, columns: Columns) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields ("line 3", picture relative to the list, captions) for every row of a list; captions may be empty.

    Raises:
        UserError: a mistake in the list, with file and line; or no row has a caption column.
    """
    wanted = caption_columns(columns[1])
    first = next(_rows(path), None)
    if first is not None and not any(column in row for _, row in _rows(path) for column in wanted):
        check_columns(f"{path}, {first[0]}", list(first[1]), columns[1])
    for line, row in _rows(path):
        where = f"{path}, {line}"
        name = row.get("file_name") or row.get(f"{columns[0]}_file_name") or row.get(columns[0])
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: no file_name; name the row's picture in that column")
        file = os.path.normpath(name.replace("\\", "/"))  # the list may come from Windows
        if file.startswith(("/", "../")) or file in ("..", ".") or re.match("[A-Za-z]:/", file):
            raise UserError(f"{where}: {name} is not inside the folder; name pictures relative to {path.name}")
        yield line, file.replace(os.sep, "/"), captions_of(row, wanted)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        for line, text in enumerate(_text_lines(path), 1):
            if text.strip():
                yield f"line {line}", json_object(text, f"{path}, line {line}")
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        yield from _parquet_rows(path)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_text_lines(path), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}, line 1: two columns are called {twice}; rename one")
        for row in reader:
            if None in row:
                fields = "more fields than the header; quote captions that contain commas"
                raise UserError(f"{path}, line {reader.line_num}: {fields}")
            yield f"line {reader.line_num}", row
    except csv.Error as error:  # the mistake is in the row after the last good one, even if csv meets it much later
        raise UserError(f"{path}, line {reader.line_num + 1}: {error}; fix the quotes there") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    number = 0
    try:
        if not path.is_file():
            raise OSError("not a file")
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{path}: cut off or damaged after {number} rows ({reason_of(error)})") from None


def _text_lines(path: Path) -> Iterator[str]:
    line = 0
    try:
        if not path.is_file():
            raise OSError("not a file")
        with path.open("rb") as file:
            for line, data in enumerate(iter(lambda: file.readline(MAX_TEXT + 1), b""), 1):
                if len(data) > MAX_TEXT:
                    raise UserError(f"{path}, line {line}: longer than {MAX_TEXT >> 20} MiB; write one row per line")
                yield data.decode("utf-8-sig" if line == 1 else "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {line}: cannot be read as UTF-8 text ({reason_of(error)})") from None
