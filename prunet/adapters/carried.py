"""What becomes of an adapter's file: which of its tensors stay, and under which names."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """A LoRA or an IP-Adapter for the student."""

    what: str
    names: Mapping[str, str]  # the file's key -> that of the new file, for what stays
    kept: list[str]  # the teacher's layers that it changes and the student has
    dropped: list[str]  # those that are gone
    metadata: Mapping[str, str]
