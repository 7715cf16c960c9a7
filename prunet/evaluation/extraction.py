"""Extracts embeddings of pictures, drawn or real, into one file for each shard; the files call them `features`.

The name of their folder has a hash of the network, of the preparation of the pictures and of what they were drawn from,
so they are never stale.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from prunet import processes
from prunet.console import progress
from prunet.data.listing import walk
from prunet.data.pictures import PICTURE_FILES, BrokenPicture, make_picture
from prunet.disk.files import new_file
from prunet.disk.reading import check_permission
from prunet.errors import UserError
from prunet.evaluation.metrics import Moments
from prunet.evaluation.networks import Features, file_hash, prepared
from prunet.evaluation.protocol import NEED_REAL, SUBJECT, Protocol, ProtocolFiles
from prunet.hashing import json_hash
from prunet.intervals import Array
from prunet.sampling.shards import SHARD, read_shard

FEWEST = 10  # with fewer pictures no number describes a distribution
WIDTH = 2048  # numbers in an Inception feature


def preparation(protocol: Protocol, network: str) -> str:
    """Describes the preparation of a picture for the network."""
    resized = (protocol.resize, protocol.resample, protocol.jpeg) if protocol.resize else ()
    how = f"{protocol.preprocessing} for pool, torch-fidelity for logits"
    return json.dumps([*resized, *([how] if network == "inception" else [])])


def tag(*values: str) -> str:
    """Returns a hash of texts, for the name of a folder."""
    return json_hash(values)[:12]


@dataclass(frozen=True)
class Shard:
    """Pictures that are processed together: a tar of drawn pictures with their prompts, or files of real pictures."""

    source: Path | tuple[Path, ...]
    count: int

    def read(self) -> list[tuple[Image.Image, str]]:
        """Reads the pictures and their prompts; those of real pictures are empty.

        Raises:
            UserError: a picture is broken, or the shard has another number of pictures.
        """
        if not isinstance(self.source, Path):
            return [(_open(path), "") for path in self.source]
        samples = list(read_shard(self.source))
        if len(samples) != self.count:
            raise UserError(f"{self.source}: {len(samples)} pictures, not {self.count}: delete it to draw it again")
        return samples


def drawn_shards(paths: Sequence[Path], count: int) -> list[Shard]:
    """Returns the shards at `paths`, which have `count` drawn pictures in all."""
    return [Shard(path, min(SHARD, count - SHARD * i)) for i, path in enumerate(paths)]


def _open(path: Path) -> Image.Image:
    try:
        return make_picture(path.name, ("",), "", path).open()
    except BrokenPicture as error:
        raise UserError(f"--real: {path.parent / error.key}: {error.why}: remove it or fix it") from error


def extract(shards: Sequence[Shard], net: Any, protocol: Protocol, folder: Path) -> None:
    """Extracts the features of each shard into its own file; whole files are kept. Processes divide the shards."""
    mine = [(i, shard) for i, shard in enumerate(shards) if processes.is_mine(i)]
    with progress(f"Features: {folder.name}", len(mine)) as bar:
        for i, shard in mine:
            path = folder / f"{i:05d}.safetensors"
            if _read(path, shard.count) is None:
                samples, drawn = shard.read(), isinstance(shard.source, Path)
                parts: list[Features] = []
                for at in range(0, len(samples), 50):
                    pictures, texts = zip(*samples[at : at + 50], strict=True)
                    how = (protocol.resize, protocol.resample, protocol.jpeg)
                    parts.append(net([prepared(p, *how) for p in pictures], list(texts) if drawn else None))
                whole = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                with new_file(path) as part_file:
                    save_file(whole, part_file)
            bar.advance()


def _read(path: Path, count: int) -> Features | None:
    """Reads the features in a file; None if it is not whole."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return found if found and all(len(value) == count for value in found.values()) else None


def gather(shards: Sequence[Shard], folder: Path) -> dict[str, Array]:
    """Returns the features of all shards by name, in order.

    Raises:
        UserError: a file is not whole.
    """
    parts = []
    for i, shard in enumerate(shards):
        path = folder / f"{i:05d}.safetensors"
        if (found := _read(path, shard.count)) is None:
            raise UserError(f"{path}: not whole: delete it, and give the same command again")
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}


@dataclass(frozen=True)
class Reference:
    """The real pictures: a folder (`files`), features that prunet saved, or moments that pytorch-fid saved.

    `content`: a hash of them.
    """

    path: Path
    content: str
    files: tuple[Path, ...] = ()

    @classmethod
    def open(cls, protocol: Protocol, files: ProtocolFiles) -> "Reference | None":
        """Opens the real pictures, by default those that lie beside the protocol; None if it needs none.

        Raises:
            UserError: the protocol needs real pictures, and these are missing or the wrong ones.
        """
        sets, subject = (names & set(protocol.metrics) for names in (NEED_REAL, SUBJECT.keys()))
        if protocol.real is None or not (sets or subject):
            return None
        wanted = protocol.real
        path = files.real or (files.beside / wanted.file if files.beside and wanted.file else None)
        if path is None:
            raise UserError(f"protocol {protocol.name} compares with real pictures: give --real PATH. {wanted.source}")
        if path.is_dir():
            found = (path / under / name for under, names in walk(path) for name in names)
            pictures = tuple(sorted(p for p in found if p.suffix.lower() in PICTURE_FILES and p.is_file()))
            if len(pictures) < (fewest := FEWEST if sets else 1):
                raise UserError(f"--real {path}: {len(pictures)} pictures in it: give at least {fewest}")
            if wanted.count not in (None, len(pictures)):
                raise UserError(f"--real {path}: {len(pictures):,} pictures, not {wanted.count:,}. {wanted.source}")
            content = tag(*(file_hash(file) for file in pictures))
        elif subject:
            raise UserError(f"--real {path}: {min(subject)} needs the subject's pictures themselves: give their folder")
        elif path.is_file() and path.suffix == ".npz":
            pictures, content = (), file_hash(path)
            if others := sorted(NEED_REAL & set(protocol.metrics) - {"fid"}):
                raise UserError(f"--real {path}: mean and covariance are not enough for {others[0]}: give the pictures")
            if protocol.features != "inception" or len(Moments.load(path).mean) != WIDTH:
                raise UserError(f"--real {path}: not of the {WIDTH} features of the Inception network")
        elif path.is_file() and path.suffix == ".safetensors":
            pictures, content = (), _label(path)["content"]
        else:
            raise UserError(f"--real {path}: give a folder of pictures, .safetensors of prunet, or pytorch-fid's .npz")
        if wanted.sha256 not in (None, content):
            raise UserError(f"--real {path}: not what protocol {protocol.name} was made with. {wanted.source}")
        return cls(path, content, pictures)

    def shards(self) -> list[Shard]:
        """Returns the files in shards of `SHARD` pictures."""
        parts = [self.files[at : at + SHARD] for at in range(0, len(self.files), SHARD)]
        return [Shard(part, len(part)) for part in parts]

    def features(self, net: Any, protocol: Protocol, extracted: Path, save_to: Path) -> Array | Moments:
        """Returns features (N, D), or moments. Features of files are read from `extracted`, and saved to `save_to`.

        Raises:
            UserError: the features are from another network or another preparation of pictures, or not usable.
        """
        if self.path.suffix == ".npz":
            return Moments.load(self.path)
        made_by = {"network": net.hash, "preparation": preparation(protocol, protocol.features)}
        key = "pool" if protocol.features == "inception" else "image"
        if self.files:
            features = gather(self.shards(), extracted)[key]
            save_features(torch.from_numpy(features).float(), save_to, {**made_by, "content": self.content})
        else:
            label = _label(self.path)
            if apart := [name for name, value in made_by.items() if label[name] != value]:
                raise UserError(f"{self.path}: features by another {apart[0]}: give the pictures themselves")
            features = load_file(self.path)["features"].double().numpy()
        count = protocol.real.count if protocol.real else None
        if features.ndim != 2 or len(features) < FEWEST or not np.isfinite(features).all():
            raise UserError(f"{self.path}: features {features.shape} are too few or not numbers")
        if count not in (None, len(features)):
            raise UserError(f"{self.path}: features of {len(features):,} pictures, not {count:,}")
        if "kid" in protocol.metrics and len(features) < protocol.kid_subset_size:
            raise UserError(
                f"{self.path}: {len(features):,} pictures are too few for KID with subsets of "
                f"{protocol.kid_subset_size:,}"
            )
        return features


def save_features(features: torch.Tensor, path: Path, label: dict[str, str]) -> None:
    """Saves features (N, D) with a label as one entry of metadata, because safetensors writes several in any order."""
    with new_file(path) as part:
        save_file({"features": features.contiguous()}, part, metadata={"prunet": json.dumps(label, sort_keys=True)})


def _label(path: Path) -> dict[str, str]:
    check_permission(path)
    try:
        with safe_open(path, "pt") as file:
            label, names = json.loads((file.metadata() or {}).get("prunet", "{}")), set(file.keys())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from error
    if {"network", "preparation", "content"} - label.keys() or "features" not in names:
        raise UserError(f"{path}: not features that prunet saved (real.safetensors of a measuring)")
    return dict(label)
