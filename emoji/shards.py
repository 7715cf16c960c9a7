"""Reads the WebDataset shards of make_data.py, all at once, because the set is small."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from unpack import read_shard

from prunet.evaluation.networks import pixels_of

STYLES = ("3d", "noto", "flat")
SPLITS = ("train", "heldout-combinations", "heldout-labels")


@dataclass
class Sample:
    label: str
    style: str
    captions: list[str]
    picture: Image.Image

    @property
    def caption(self) -> str:
        """The caption that measures use as the prompt."""
        return f"{self.label.lower()}, {self.style}"


def read_known_labels() -> list[str]:
    """Returns the labels that the denoiser learns; the text encoders see them more often than the others."""
    return (Path(__file__).parent / "known-labels.txt").read_text().splitlines()


def known_samples(data: Path, split: str) -> list[Sample]:
    known = set(read_known_labels())
    return [sample for sample in read_split(data, split) if sample.label in known]


def read_split(data: Path, split: str) -> list[Sample]:
    shards = sorted(data.glob(f"{split}-*.tar"))
    if not shards:
        raise SystemExit(f"no {split}-*.tar in {data}: run make_data.py first")
    return [
        Sample(record["label"], record["style"], record["captions"], Image.open(io.BytesIO(webp)).convert("RGB"))
        for shard in shards
        for _, webp, record in read_shard(shard)
    ]


def stack_images(samples: list[Sample]) -> Tensor:
    return pixels_of([sample.picture for sample in samples])  # (N, 3, H, W) uint8


def to_model(images: Tensor) -> Tensor:
    """Converts uint8 to float in [-1, 1]."""
    return images.float().div(127.5).sub(1)
