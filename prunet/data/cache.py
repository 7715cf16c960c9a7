"""The cache: latents and prompt embeddings, made once by the teacher's frozen parts and labelled.

A cache folder holds `spec.json` (what it is made of), `source.json` (by which its pictures are known),
`shard-00000.safetensors` ... (256 samples each: `mean` and `std` (N, 4, h, w) of the scaled latents, `prompt_embeds`
(N, 77, D), for SDXL `pooled` (N, P) and `time_ids` (N, 6)), with `buckets` one `mean.I` and `std.I` a sample instead,
because their sizes differ, in a cache of paths `path` (`prunet.data.paths`), `unconditional.safetensors`, and, once it
is whole, `cache.json` with the number of samples, the pictures skipped and the number of captions cut.
A shard is whole or not there, and depends on nothing but the spec, so a killed run resumes at the first missing one. It
carries a checksum, which a process verifies when it first reads it.
"""

import bisect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunet.denoisers.condition import Condition
from prunet.disk.files import read_label
from prunet.disk.seals import CHECKSUM, checksum
from prunet.errors import UserError
from prunet.teacher.teacher import Teacher

FORMAT = 2
SHARD = 256


STORED = torch.float16
_verified: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser meets it: mean and std (C, h, w) of its latents, and its condition."""

    mean: Tensor
    std: Tensor
    condition: Condition


@dataclass(frozen=True)
class Cache:
    """A whole cache folder, opened for reading; samples are read from disk when asked for."""

    folder: Path
    spec: dict[str, Any]
    counts: tuple[int, ...]  # samples in each shard
    skipped: tuple[tuple[str, str], ...]  # key of a picture, and why it could not be used
    groups: tuple[Sequence[int], ...]  # the samples of each size, by number

    @classmethod
    def open(cls, folder: Path | str) -> "Cache":
        """Opens a finished cache and checks that its shards are all there and whole.

        Raises:
            UserError: not a cache, not finished, or a shard that does not match its label.
        """
        folder = Path(folder)
        _opened.cache_clear()  # of a cache that was deleted and made again the old files would still be open
        if not (folder / "cache.json").is_file():
            raise UserError(f"{folder}: no finished cache there; make it with `prunet cache RECIPE`")
        keys = ("counts", "skipped", "groups", "samples")
        index = read_label(folder / "cache.json", keys, "delete it and run the cache again")
        cache = cls(
            folder,
            read_spec(folder),
            tuple(index["counts"]),
            tuple(map(tuple, index["skipped"])),
            tuple(index["groups"] or [range(index["samples"])]),
        )
        for shard, count in enumerate(cache.counts):
            found = shard_label(shard_path(folder, shard))["count"]
            if found != count:
                raise UserError(f"{shard_path(folder, shard)}: {found} samples, {count} expected: delete {folder}")
        return cache

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.counts))

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w), with buckets the largest."""
        return max((self.size_of(group[0]) for group in self.groups), key=lambda size: size[0] * size[1])

    def size_of(self, index: int) -> tuple[int, int]:
        """(h, w) of a sample."""
        tensors = self._tensors(index)
        height, width = tensors["path" if "path" in tensors else "mean"].shape[-2:]
        return height, width

    def check(self, teacher: Teacher) -> None:
        """Refuses a cache that another teacher made."""
        other = [part for part, made_by in self.spec["parts"].items() if made_by != teacher.fingerprint([part])]
        if other:
            raise UserError(
                f"{self.folder}: made with another {' and '.join(other)} than {teacher.source} has: delete the folder, "
                "or give another one with 'cache:'"
            )

    def kept(self, spec: dict[str, Any], shard: int) -> dict[str, Tensor]:
        """What a cache of `spec` can take over from a shard of this one: latents if the VAE is the same, embeddings if
        the text encoders are, nothing if the data is another.
        """
        ours, theirs = self.spec, spec
        if (
            any(ours[key] != theirs[key] for key in spec if key != "parts")
            or ours["parts"].keys() != theirs["parts"].keys()
        ):
            return {}
        same = {part for part, made_by in theirs["parts"].items() if ours["parts"][part] == made_by}
        stems = {"mean", "std"} if {"vae", "unet"} & theirs["parts"].keys() <= same else set()
        if {part for part in theirs["parts"] if part.startswith("text_encoder")} <= same:
            stems |= {"prompt_embeds", "pooled"}
        file = _opened(shard_path(self.folder, shard))
        return {name: file.get_tensor(name).float() for name in file.keys() if name.split(".")[0] in stems}  # noqa: SIM118

    def sample(self, index: int) -> Sample:
        tensors = self._tensors(index)
        return Sample(tensors.pop("mean"), tensors.pop("std"), Condition(tensors))

    def path(self, index: int) -> tuple[Tensor, Condition]:
        """A teacher's way from noise to picture (steps + 1, C, h, w), and its condition; of a cache of paths."""
        tensors = self._tensors(index)
        return tensors.pop("path"), Condition(tensors)

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """All that is stored of a sample, by name."""
        shard = bisect.bisect_right(self._ends, index)
        index -= self._ends[shard] - self.counts[shard]
        file = _opened(shard_path(self.folder, shard))
        keys = set(file.keys())

        def row(name: str) -> Tensor:
            if f"{name}.{index}" in keys:  # with buckets each has its own size
                value: Tensor = file.get_tensor(f"{name}.{index}")
            else:
                value = file.get_slice(name)[index : index + 1][0]
            return value.float()

        return {name: row(name) for name in sorted({key.split(".")[0] for key in keys})}

    @property
    def unconditional(self) -> Condition:
        """What a dropped caption becomes, as one row."""
        file = _opened(self.folder / "unconditional.safetensors")
        return Condition({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


@lru_cache(maxsize=512)
def _opened(path: Path) -> Any:
    """A shard, verified when this process opens it first."""
    try:
        file, found = safe_open(path, framework="pt"), path.stat()
        as_it_is = (path, found.st_ino, found.st_size, found.st_mtime_ns)
        if as_it_is not in _verified:
            label = json.loads(file.metadata()["label"])
            expected = label.pop(CHECKSUM, None)  # caches of older versions have none
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if expected not in (None, shard_checksum(path, tensors, label)):
                raise ValueError("its checksum is another than when it was written")
            _verified.add(as_it_is)
        return file
    except Exception as error:
        raise UserError(f"{path}: missing, damaged or of another cache ({error}): {_again(path)}") from error


def shard_checksum(path: Path, tensors: dict[str, Tensor], label: dict[str, Any]) -> str:
    """Of all that a shard holds, under its name and its cache's spec."""
    spec = read_spec(path.parent)
    about = [path.name, spec, label, {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}]
    data = (tensors[name].view(-1).view(torch.uint8).numpy() for name in sorted(tensors))
    return checksum([json.dumps(about, sort_keys=True).encode(), *data])


def shard_label(path: Path) -> dict[str, Any]:
    """`count`, `captions`, `skipped` and, with buckets, the `sizes` (h, w) of the samples."""
    if not path.is_file():
        raise UserError(f"{path}: missing: {_again(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            label: dict[str, Any] = json.loads(file.metadata()["label"])
            _ = label["count"], label["captions"], label["skipped"]
            return label
    except Exception as error:
        raise UserError(f"{path}: damaged ({error}): {_again(path)}") from error


def _again(path: Path) -> str:
    """A cache without `cache.json` resumes at the first file that is not there."""
    it = f"{path} and " if path.exists() else ""
    return f"delete {it}{path.parent / 'cache.json'} and run the cache again"


def read_spec(folder: Path) -> dict[str, Any]:
    """The spec of the cache in a folder.

    Raises:
        UserError: damaged.
    """
    keys = ("format", "parts", "data", "content", "empty_prompt", "seed")
    return read_label(folder / "spec.json", keys, f"delete {folder}, or give another cache with 'cache:'")
