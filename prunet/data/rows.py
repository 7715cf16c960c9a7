"""Pictures in columns of Parquet files, of datasets saved to disk, and of datasets of the Hub.

`datasets` writes a picture as its bytes, or only as a path. Rows may contain any path, but prunet follows only paths
below the folder of the data, or on the Hub.
"""

import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from prunet.data.captions import Columns, captions_of, check_columns
from prunet.data.pictures import Picture, as_text, broken_picture, extra, make_picture, reason_of
from prunet.data.remote import File
from prunet.errors import UserError


def read_parquet(columns: Columns, path: File, label: str) -> Iterator[Picture]:
    """Reads the samples of a Parquet file; damage becomes a last, broken sample.

    Raises:
        UserError: a column is missing.
    """
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    number = 0
    try:
        if not path.is_file():
            raise OSError("not a file")  # reading a pipe would block
        folder = path.parent if isinstance(path, Path) else None
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            captions = _check_columns(str(path), file.schema_arrow.names, columns)
            for batch in file.iter_batches(batch_size=16, columns=[columns[0], *captions]):
                for row in batch.to_pylist():
                    yield _from_row(f"{label}/{number:08d}", row, columns[0], captions, folder)
                    number += 1
    except (OSError, ValueError, arrow.ArrowException) as error:
        yield broken_picture(label, f"file cut off or damaged after {number} rows ({reason_of(error)})")


def picture_paths(path: Path, image_column: str) -> list[Path]:
    """Lists the picture files that rows of a Parquet file refer to, below its folder; none if the file is damaged."""
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            kind = file.schema_arrow.field(image_column).type
            if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
                return []  # the pictures themselves
            column = f"{image_column}.path" if arrow.types.is_struct(kind) else image_column
            rows = [row for batch in file.iter_batches(columns=[column]) for row in batch.column(0).to_pylist()]
    except (OSError, ValueError, KeyError, arrow.ArrowException):
        return []
    names = (row.get("path") if isinstance(row, dict) else row for row in rows)
    found = (_below(path.parent, name) for name in dict.fromkeys(names) if isinstance(name, str))
    return [file for file in found if file is not None and file.is_file()]


def saved_dataset(folder: Path) -> Path | None:
    """Returns the folder of a saved `datasets.Dataset`, or of the split of a saved `DatasetDict`, or None.

    Raises:
        UserError: there are several splits, and none is called `train`.
    """
    if _is_dataset(folder):
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    splits = sorted(path.name for path in folder.iterdir() if _is_dataset(path))
    if len(splits) != 1 and "train" not in splits:
        what = f"holds the splits {', '.join(splits)}; name one, such as" if splits else "holds no split such as"
        raise UserError(f"{folder}: {what} {folder / (splits or ['train'])[0]}")
    return folder / (splits[0] if len(splits) == 1 else "train")


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def read_saved(folder: Path, columns: Columns) -> Iterator[Picture]:
    """Reads the samples of a saved `datasets.Dataset`; damage becomes a last, broken sample.

    Raises:
        UserError: the dataset is not readable, or a column is missing or does not contain pictures.
    """
    datasets = extra("datasets", f"{folder}: a saved dataset; ")
    try:
        rows = datasets.load_from_disk(str(folder)).with_format(None)
        rows.data.validate(full=True)  # Arrow trusts its files, so wrong offsets would crash the process
    except Exception as error:  # from pyarrow, from JSON, from unknown features
        raise UserError(f"{folder}: not a readable dataset; save it again ({reason_of(error)})") from None
    captions = _check_columns(str(folder), rows.column_names, columns)
    rows = _undecoded(str(folder), rows, columns[0], captions)
    return _saved_rows(rows, as_text(folder.absolute().name), columns[0], captions, folder)


def _saved_rows(rows: Any, label: str, image_column: str, captions: tuple[str, ...], folder: Path) -> Iterator[Picture]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield _from_row(f"{label}/{number - 1:08d}", row, image_column, captions, folder)
    except Exception as error:
        yield broken_picture(label, f"dataset cut off or damaged after {number} rows ({reason_of(error)})")


def read_hub(source: str, columns: Columns) -> Iterator[Picture]:
    """Streams the samples of a dataset of the Hub, `owner/name[:split]`.

    Raises:
        UserError: the dataset is not available, or a column is missing or does not contain pictures.
    """
    datasets = extra("datasets", f"{source}: no such folder here; ")
    name, _, split = source.partition(":")
    split = split or "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # no network, a wrong name or split, no right to read it, ...
        why = f"{type(error).__name__}: {reason_of(error)}"
        what = "no such folder here, and the Hub cannot provide it; check owner/name:split and the network"
        raise UserError(f"{source}: {what} ({why})") from None
    captions = _check_columns(source, names, columns)
    rows = _undecoded(source, rows, columns[0], captions)
    keys = map(f"{name}/{split}/{{:08d}}".format, count())
    return (_from_row(key, row, columns[0], captions, None) for key, row in zip(keys, rows, strict=False))


def _undecoded(where: str, rows: Any, image_column: str, captions: tuple[str, ...]) -> Any:
    image = extra("datasets").Image(decode=False)
    try:
        return rows.select_columns([image_column, *captions]).cast_column(image_column, image)
    except Exception as error:
        raise UserError(f"{where}: column {image_column} does not hold pictures ({reason_of(error)})") from None


def _check_columns(where: str, names: list[str], columns: Columns) -> tuple[str, ...]:
    if columns[0] not in names:
        has = f"it has {', '.join(names)}"
        raise UserError(f"{where}: no picture column {columns[0]}; {has}: name one with image_column")
    return check_columns(where, names, columns[1])


def _from_row(
    key: str, row: dict[str, Any], image_column: str, captions: tuple[str, ...], folder: Path | None
) -> Picture:
    value = row[image_column]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if not isinstance(data, bytes):
        if not isinstance(path, str):
            return broken_picture(key, f"no picture in column {image_column}")
        if re.search("(^|::)hf://", path):
            data = path
        elif folder is None or not (data := _below(folder, path)):
            away = f"column {image_column} has only a path, which is not below the folder of the data"
            return broken_picture(key, f"{away}: {as_text(path)}; save the dataset with the pictures in it")
    return make_picture(key, captions_of(row, captions), f"no caption in column {' or '.join(captions)}", data)


def _below(folder: Path, path: str) -> Path | None:
    file = Path(os.path.normpath(folder.absolute() / path))
    return file if file.is_relative_to(os.path.normpath(folder.absolute())) else None
