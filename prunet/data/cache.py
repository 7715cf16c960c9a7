"""The cache: latents and prompt embeddings, made once by the teacher's frozen parts and labelled.

A cache folder holds:

- `spec.json`: everything that its bytes depend on;
- `source.json`: the state of the picture files, so that they are read again only after a change;
- `shard-00000.safetensors` ...: blocks of 256 samples, with `mean` and `std` (N, 4, h, w) of the scaled latents,
  `prompt_embeds` (N, 77, D), and for SDXL `pooled` (N, P) and `time_ids` (N, 6). With `buckets` each sample has its own
  `mean.I` and `std.I`, because sizes differ. A cache of paths has `path` instead (`prunet.data.paths`); with
  `text: live` there are no `prompt_embeds` and `pooled`, but the captions in the block's label;
- `unconditional.safetensors`: the condition of the empty prompt;
- `files.json`: the number of samples in each file that was read to its end (`prunet.data.stream`);
- `cache.json`, once the cache is whole: the index, so that opening the cache reads no block. It has the samples and
  bytes of each block, for each sample the number of its size as a character (`shapes`), the skipped pictures, and the
  number of cut captions.

A block is whole or absent, and depends only on the spec, so a killed run resumes at the first missing block. Each block
has a checksum, which a process verifies when it first reads the block.
"""

import bisect
import itertools
import json
import os
import string
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from prunet.denoisers.condition import Condition
from prunet.disk.files import read_label
from prunet.disk.reading import check_permission
from prunet.disk.seals import CHECKSUM, checksum
from prunet.errors import UserError
from prunet.teacher.teacher import Teacher

FORMAT = 2
BLOCK = 256  # samples
MOST_NAMED = 10_000  # skipped pictures in the index; the labels of the blocks name all
_CHARACTERS = string.digits + string.ascii_letters + "-_"
STORED = torch.float16
_verified: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser's input: mean and std (C, h, w) of its latents, and its condition."""

    mean: Tensor
    std: Tensor
    condition: Condition


@dataclass(frozen=True)
class Cache:
    """A finished cache folder, opened for reading; samples are read from disk on demand."""

    folder: Path
    spec: dict[str, Any]
    counts: tuple[int, ...]  # samples in each block
    skipped: tuple[tuple[str, str], ...]  # key of a picture, and why it could not be used; the first `MOST_NAMED`
    groups: tuple[Sequence[int], ...]  # numbers of the samples of each size

    @classmethod
    def open(cls, folder: Path | str) -> "Cache":
        """Opens a finished cache, and checks that all its blocks exist and are whole.

        Raises:
            UserError: the folder is not a finished cache, or a block is missing or has another length.
        """
        folder = Path(folder)
        _opened.cache_clear()  # otherwise files of a cache that was deleted and made again stay open
        if not (folder / "cache.json").is_file():
            raise UserError(f"{folder}: no finished cache there; make it with `prunet cache RECIPE`")
        keys = ("counts", "skipped", "samples")
        index = read_label(folder / "cache.json", keys, "delete it and run the cache again")
        cache = cls(
            folder,
            read_spec(folder),
            tuple(index["counts"]),
            tuple(map(tuple, index["skipped"])),
            _groups(index),
        )
        found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        sizes = index.get("bytes") or [None] * len(cache.counts)  # absent in caches of older versions
        for path, size in zip(map(partial(block_path, folder), itertools.count()), sizes, strict=False):
            if path.name not in found:
                raise UserError(f"{path}: missing: {_again(path)}")
            if size not in (None, found[path.name]):
                raise UserError(f"{path}: damaged ({found[path.name]:,} bytes of {size:,}): {_again(path)}")
        return cache

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.counts))

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents; the largest if sizes differ."""
        return max((self.size_of(group[0]) for group in self.groups), key=lambda size: size[0] * size[1])

    def size_of(self, index: int) -> tuple[int, int]:
        """Returns (h, w) of a sample."""
        tensors = self._tensors(index)
        height, width = tensors["path" if "path" in tensors else "mean"].shape[-2:]
        return height, width

    @property
    def has_text(self) -> bool:
        """Whether samples have their prompt embeddings; if not, captions are embedded while training."""
        return bool(self.spec["data"].get("text", "cached") == "cached")

    def caption(self, index: int) -> str:
        """Reads the caption of a sample."""
        file, row = self._place(index)
        return _captions(file)[row]

    def check(self, teacher: Teacher) -> None:
        """Refuses a cache that another teacher made.

        Raises:
            UserError: which parts of the teacher differ.
        """
        other = [part for part, made_by in self.spec["parts"].items() if made_by != teacher.fingerprint([part])]
        if other:
            raise UserError(
                f"{self.folder}: made with another {' and '.join(other)} than {teacher.source} has: delete the folder, "
                "or give another one with 'cache:'"
            )

    def kept(self, spec: dict[str, Any], block: int) -> dict[str, Tensor]:
        """Returns the tensors that a cache of `spec` can copy from a block of this one.

        These are latents if the VAE is the same, embeddings if the text encoders are the same, and none if the data
        differ.
        """
        ours, theirs = self.spec, spec
        if (
            any(ours[key] != theirs[key] for key in spec if key != "parts")
            or ours["parts"].keys() != theirs["parts"].keys()
        ):
            return {}
        same = {part for part, made_by in theirs["parts"].items() if ours["parts"][part] == made_by}
        stems = {"mean", "std"} if "vae" in same else set()
        if {part for part in theirs["parts"] if part.startswith("text_encoder")} <= same:
            stems |= {"prompt_embeds", "pooled"}
        file = _opened(block_path(self.folder, block))
        return {name: file.get_tensor(name).float() for name in file.keys() if name.split(".")[0] in stems}  # noqa: SIM118

    def sample(self, index: int) -> Sample:
        """Reads a sample, in float32."""
        tensors = self._tensors(index)
        return Sample(tensors.pop("mean"), tensors.pop("std"), Condition(tensors))

    def path(self, index: int) -> tuple[Tensor, Condition]:
        """Reads a sample of a cache of paths: a path from noise to picture (steps + 1, C, h, w), and its condition."""
        tensors = self._tensors(index)
        return tensors.pop("path"), Condition(tensors)

    def _place(self, index: int) -> tuple[Any, int]:
        """The opened block of a sample, and its row there."""
        block = bisect.bisect_right(self._ends, index)
        return _opened(block_path(self.folder, block)), index - self._ends[block] + self.counts[block]

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """Reads everything stored for a sample, by name."""
        file, index = self._place(index)
        keys = set(file.keys())

        def row(name: str) -> Tensor:
            if f"{name}.{index}" in keys:  # with buckets, each sample has its own size
                value: Tensor = file.get_tensor(f"{name}.{index}")
            else:
                value = file.get_slice(name)[index : index + 1][0]
            return value.float()

        return {name: row(name) for name in sorted({key.split(".")[0] for key in keys})}

    @property
    def unconditional(self) -> Condition:
        """The condition that replaces a dropped caption, as one row."""
        file = _opened(self.folder / "unconditional.safetensors")
        return Condition({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118


def shapes_text(groups: Sequence[int]) -> str:
    """The number of each sample's size as one character, so that a million samples take a million characters."""
    return "".join(map(_CHARACTERS.__getitem__, groups))


def _groups(index: dict[str, Any]) -> tuple[Sequence[int], ...]:
    """The numbers of the samples of each size."""
    if "shapes" not in index:  # older versions wrote the numbers
        return tuple(index["groups"] or [range(index["samples"])])
    shapes = np.frombuffer(index["shapes"].encode(), np.uint8)
    if not len(shapes):
        return (range(index["samples"]),)
    found = (np.flatnonzero(shapes == ord(character)).astype(np.int32) for character in _CHARACTERS)
    return tuple(array("i", numbers.tobytes()) for numbers in found if len(numbers))


def block_path(folder: Path, block: int) -> Path:
    """Returns the file of a block."""
    return folder / f"shard-{block:05d}.safetensors"


@lru_cache(maxsize=512)
def _opened(path: Path) -> Any:
    """Opens a block, and verifies its checksum when this process opens it for the first time."""
    check_permission(path)
    try:
        file, found = safe_open(path, framework="pt"), path.stat()
        as_it_is = (path, found.st_ino, found.st_size, found.st_mtime_ns)
        if as_it_is not in _verified:
            label = json.loads(file.metadata()["label"])
            expected = label.pop(CHECKSUM, None)  # absent in caches of older versions
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if expected not in (None, block_checksum(path, tensors, label)):
                raise ValueError("its checksum differs from when it was written")
            _verified.add(as_it_is)
        return file
    except Exception as error:
        raise UserError(f"{path}: missing, damaged or of another cache ({error}): {_again(path)}") from error


@lru_cache(maxsize=512)
def _captions(file: Any) -> list[str]:
    """The captions of an opened block."""
    captions: list[str] = json.loads(file.metadata()["label"])["captions"]
    return captions


def block_checksum(path: Path, tensors: dict[str, Tensor], label: dict[str, Any]) -> str:
    """Returns a checksum of everything in a block, of the file's name and of the cache's spec."""
    spec = read_spec(path.parent)
    about = [path.name, spec, label, {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}]
    data = (tensors[name].view(-1).view(torch.uint8).numpy() for name in sorted(tensors))
    return checksum([json.dumps(about, sort_keys=True).encode(), *data])


def block_label(path: Path) -> dict[str, Any]:
    """Reads the label of a block: `count`, `captions`, `skipped` and, with buckets, the `sizes` (h, w) of the samples.

    Raises:
        UserError: the block is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing: {_again(path)}")
    check_permission(path)
    try:
        with safe_open(path, framework="pt") as file:
            label: dict[str, Any] = json.loads(file.metadata()["label"])
            _ = label["count"], label["captions"], label["skipped"]
            return label
    except Exception as error:
        raise UserError(f"{path}: damaged ({error}): {_again(path)}") from error


def _again(path: Path) -> str:
    # After `cache.json` is deleted, the cache resumes at the first missing file.
    it = f"{path} and " if path.exists() else ""
    return f"delete {it}{path.parent / 'cache.json'} and run the cache again"


def read_spec(folder: Path) -> dict[str, Any]:
    """Reads the spec of the cache in a folder.

    Raises:
        UserError: the spec is damaged.
    """
    keys = ("format", "parts", "data", "content", "empty_prompt", "seed")
    return read_label(folder / "spec.json", keys, f"delete {folder}, or give another cache with 'cache:'")
