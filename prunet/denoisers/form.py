"""The form of a student: its config and where its weights come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """A plan's student as a stock denoiser. The maps lead from names in the student to names in the teacher."""

    config: dict[str, Any]
    module_map: dict[str, str]  # modules, by prefixes of their names; the longest prefix counts
    weight_map: dict[str, str]  # parameters
    implied: tuple[str, ...]  # parts removed with those named (the sampler that led to a removed level of a U-Net)
    new: tuple[str, ...] = ()  # parameters that the teacher does not have; they begin at zero


def teacher_name(name: str, mapping: Mapping[str, str]) -> str:
    """Returns the teacher's name for a module or parameter of the student."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in mapping:
            return ".".join([mapping[prefix], *parts[end:]])
    return name
