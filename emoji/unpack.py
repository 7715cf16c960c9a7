"""Unpacks the first pictures of a shard into a folder, each with its captions in a text file beside it.

python emoji/unpack.py emoji/data/train-0000.tar pictures --limit 256
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from prunet.data.shards import read_samples


def read_shard(shard: Path) -> Iterator[tuple[str, bytes, dict]]:
    """Yields each sample's name, its picture as WebP, and its record."""
    for name, files in read_samples(shard):
        if isinstance(files, Exception):
            raise files
        webp, text = files[".webp"], files[".json"]
        assert webp and text
        yield name, webp, json.loads(text)


def unpack(shard: Path, folder: Path, limit: int | None = None) -> int:
    """Writes `NAME.webp` and `NAME.txt` (one caption a line) of the first `limit` samples; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = 0
    for name, webp, record in itertools.islice(read_shard(shard), limit):
        (folder / f"{name}.webp").write_bytes(webp)
        (folder / f"{name}.txt").write_text("\n".join(record["captions"]) + "\n")
        pictures += 1
    return pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only the first pictures")
    given = parser.parse_args()
    print(f"{unpack(given.shard, given.folder, given.limit)} pictures in {given.folder}")
