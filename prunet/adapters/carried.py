"""An adapter carried over to a student: the tensors that stay, and their new names."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """A LoRA or an IP-Adapter for the student."""

    what: str
    names: Mapping[str, str]  # maps keys of the file to keys of the new file, for tensors that stay
    kept: list[str]  # the teacher's layers that it changes and the student has
    dropped: list[str]  # those that are gone
    metadata: Mapping[str, str]
