"""What all denoisers have in common: pairs of modules, and the levels at which they are compared."""

from dataclasses import dataclass
from typing import Literal, get_args

#: How closely student and teacher are compared (see `prunet.denoisers.unet2d.pairs`).
Level = Literal["block", "layer", "attention", "transformer"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Pair:
    """A student module, and the teacher module that it is compared with. The term is named after the teacher's."""

    student: str
    teacher: str
