"""Many pictures, drawn in shards by any number of processes, and resumable.

A shard is a WebDataset tar of `SHARD` pictures with their prompts (`000123.png`, `000123.txt`), written whole or not at
all. Each picture has its own generator, and the batches of a shard are always the same, so a shard has the same bytes
for any process that draws it.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from prunet import processes
from prunet.console import progress
from prunet.disk.files import new_file
from prunet.errors import UserError
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw
from prunet.sampling.pictures import encode

SHARD = 100


def draw_shards(
    open_pipe: Callable[[], Any],
    prompts: Sequence[str],
    folder: Path,
    how: Drawing,
    *,
    seed: int,
    size: int,
    jpeg: int | None = None,
    batch_size: int = 4,
) -> list[Path]:
    """Draws a picture of each prompt, the i-th from seed + i, into `folder`; shards that exist are kept.

    `open_pipe` is called when the first picture is drawn, so a finished set costs nothing. `jpeg` is a quality;
    None means PNG. Returns the paths of all shards, including those of the other processes.
    """
    paths = [folder / f"{at // SHARD:05d}.tar" for at in range(0, len(prompts), SHARD)]
    mine = [at for i, at in enumerate(range(0, len(prompts), SHARD)) if processes.is_mine(i)]
    pipe = None
    with progress("Drawing", sum(len(prompts[at : at + SHARD]) for at in mine)) as bar:
        for at in mine:
            path, texts = paths[at // SHARD], prompts[at : at + SHARD]
            if path.is_file():
                bar.advance(len(texts))
                continue
            pipe = pipe or open_pipe()
            pictures: list[Image.Image] = []
            for start in range(0, len(texts), batch_size):
                batch = texts[start : start + batch_size]
                seeds = [seed + at + start + i for i in range(len(batch))]
                pictures += draw(pipe, batch, seeds, how, size=size, batch_size=batch_size)
                bar.advance(len(batch))
            with new_file(path) as part:
                _write_shard(part, at, pictures, texts, jpeg)
    return paths


def _write_shard(
    path: Path, first: int, pictures: Sequence[Image.Image], prompts: Sequence[str], jpeg: int | None
) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True), first):
            for suffix, data in (("jpg" if jpeg else "png", encode(picture, jpeg)), ("txt", prompt.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")  # no time, no owner: equal pictures, equal files
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_shard(path: Path) -> Iterator[tuple[Image.Image, str]]:
    """Yields the pictures of a shard that `draw_shards` wrote, with their prompts.

    Raises:
        UserError: the file is not a shard, or is damaged.
    """
    try:
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(n for n in files if not n.endswith(".txt")):
            picture = Image.open(io.BytesIO(files[name]), formats=("PNG", "JPEG")).convert("RGB")
            yield picture, files[f"{name.rpartition('.')[0]}.txt"].decode()
    except (OSError, tarfile.TarError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}): delete it to draw it again") from error
