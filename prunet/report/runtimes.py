"""What a run exported for OpenVINO, side by side: size, time, nearness, and which export is the better trade."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from prunet.disk.files import read_json

#: Differences that do not count: a share of size or time, and decibels.
SHARE, DECIBELS = 0.05, 0.5


class Exported(NamedTuple):
    """An export: its folder, bytes of all models, seconds of a picture, PSNR (dB) against 16-bit weights in f32."""

    name: str
    bytes: int
    seconds: float
    psnr: float

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes / 1e6:,.1f} MB, {self.seconds:.2f} s a picture, PSNR {self.psnr:.1f} dB"


def exported(folder: Path, pipeline: str | None) -> list[Exported]:
    """Returns the exports for OpenVINO in a run folder, the largest first; those of an earlier student are left out.

    `pipeline`: the fingerprint of the run's pipeline.
    """
    read = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/openvino.json"))}
    found = [
        Exported(name, facts["bytes"], facts["seconds"], facts["psnr"])
        for name, facts in read.items()
        if facts.get("pipeline", pipeline) == pipeline  # older exports do not say it
    ]
    return sorted(found, key=lambda one: -one.bytes)


def better_trades(exports: Sequence[Exported]) -> list[str]:
    """Returns a sentence for each export that another one replaces: no worse in anything, and better in something.

    If no export replaces another, it returns one sentence that says so; of one export alone, nothing.
    """
    found = {
        worse.name: f"{better.name} is a better trade than {worse.name}"
        for better, worse in permutations(exports, 2)
        if not _is_better(worse, better) and _is_better(better, worse)
    }
    if not found and len(exports) > 1:
        return ["None of them is a better trade than another."]
    return [f"{text}: no worse in size, time and nearness, and better in some." for text in found.values()]


def _is_better(one: Exported, other: Exported) -> bool:
    """Returns whether `one` is better than `other` in anything."""
    smaller, faster = one.bytes < (1 - SHARE) * other.bytes, one.seconds < (1 - SHARE) * other.seconds
    return smaller or faster or one.psnr > other.psnr + DECIBELS
