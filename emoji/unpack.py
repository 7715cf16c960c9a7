"""Unpacks the first pictures of a shard into a folder, each with its captions in a text file beside it.

python emoji/unpack.py emoji/data/train-0000.tar pictures --limit 256
"""

import argparse
import json
import tarfile
from pathlib import Path


def unpack(shard: Path, folder: Path, limit: int | None = None) -> int:
    """Writes `NAME.webp` and `NAME.txt` (one caption a line) of the first `limit` samples; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = 0
    with tarfile.open(shard) as tar:
        for member in tar:
            name, content = Path(member.name), tar.extractfile(member)
            if content is None:
                continue
            if name.suffix == ".webp":
                if pictures == limit:
                    break
                (folder / name.name).write_bytes(content.read())
                pictures += 1
            elif name.suffix == ".json":  # follows its picture
                (folder / name.with_suffix(".txt").name).write_text("\n".join(json.load(content)["captions"]) + "\n")
    return pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only the first pictures")
    given = parser.parse_args()
    print(f"{unpack(given.shard, given.folder, given.limit)} pictures in {given.folder}")
