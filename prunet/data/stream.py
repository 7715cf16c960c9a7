"""The samples of a source with their numbers; only the needed ones are read.

When the end of a file is reached, its number of samples is recorded (`files.json`). So a cache that resumes skips the
files that it has finished, and files behind a slow network are fetched only once.
"""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from prunet import processes
from prunet.data.pictures import Picture
from prunet.data.rows import saved_dataset
from prunet.data.sources import picture_files, read_pictures
from prunet.disk.files import read_json, write_json
from prunet.recipe.recipe import Data

COUNTS = "files.json"


def sample_count(data: Data) -> int | None:
    """Returns the number of samples, skipped ones too, or None where all pictures must be read to count them."""
    folder = data.source if isinstance(data.source, str) and os.path.isdir(data.source) else None
    if folder is None or saved_dataset(Path(folder)):
        return data.limit and data.limit * data.views
    pictures = read_pictures(folder, image_column=data.image_column, caption_column=data.caption_column)
    return data.views * sum(1 for _ in islice(pictures, data.limit))


def numbered(data: Data, folder: Path, needed: Callable[[range], bool]) -> Iterator[tuple[int, Picture | None]]:
    """Yields (number, picture) of the samples in order, and (number, None) for the last sample of a skipped file.

    A file is skipped if its count is known in `folder` and its numbers are not `needed`.
    """
    assert data.source is not None
    counts: dict[str, int] = read_json(folder / COUNTS) if (folder / COUNTS).is_file() else {}
    start, end = 0, data.limit
    for name, pictures in picture_files(
        data.source, image_column=data.image_column, caption_column=data.caption_column
    ):
        if end is not None and start >= end:
            return
        if name in counts and not needed(range(start, start + counts[name])):
            start += counts[name]
            if counts[name]:
                yield start - 1, None
            continue
        first = start
        for picture in pictures:
            if start == end:
                return
            yield start, picture
            start += 1
        if processes.is_main() and name not in counts:
            counts[name] = start - first
            write_json(folder / COUNTS, counts)
