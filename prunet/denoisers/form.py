"""What a plan leaves of a denoiser, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """The stock denoiser of what a plan leaves."""

    config: dict[str, Any]
    module_map: dict[str, str]  # student module -> teacher module, by the smallest prefixes; the longest one counts
    weight_map: dict[str, str]  # student parameter -> teacher parameter
    implied: tuple[str, ...]  # parts that go with those removed (the sampler that led to a removed level of a U-Net)


def teacher_name(name: str, mapping: Mapping[str, str]) -> str:
    """The teacher's name of a student's module or parameter."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in mapping:
            return ".".join([mapping[prefix], *parts[end:]])
    return name
