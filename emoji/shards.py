"""Read the WebDataset shards of make_data.py. The set is small: everything is read at once."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STYLES = ("3d", "noto", "flat")
SPLITS = ("train", "heldout-combinations", "heldout-labels")


@dataclass
class Sample:
    key: str
    label: str
    style: str
    captions: list[str]
    image: Tensor  # (3, H, W) uint8

    @property
    def caption(self) -> str:
        """The one that measures ask for."""
        return f"{self.label.lower()}, {self.style}"


def read_known_labels() -> list[str]:
    """The labels the denoiser learns; the text encoders see them more often than the others."""
    return (Path(__file__).parent / "known-labels.txt").read_text().splitlines()


def known_samples(data: Path, split: str) -> list[Sample]:
    known = set(read_known_labels())
    return [sample for sample in read_split(data, split) if sample.label in known]


def read_split(data: Path, split: str) -> list[Sample]:
    shards = sorted(data.glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"no {split}-*.tar in {data}: run make_data.py first")
    samples = []
    for shard in shards:
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                files.setdefault(key, {})[suffix] = tar.extractfile(member).read()
        for key, parts in files.items():
            record = json.loads(parts["json"])
            pixels = np.array(Image.open(io.BytesIO(parts["webp"])).convert("RGB"))
            image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
            samples.append(Sample(key, record["label"], record["style"], record["captions"], image))
    return samples


def stack_images(samples: list[Sample]) -> Tensor:
    return torch.stack([sample.image for sample in samples])  # (N, 3, H, W) uint8


def to_model(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]"""
    return images.float().div(127.5).sub(1)
