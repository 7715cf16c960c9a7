"""Pairs of modules that distillation compares, and how closely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import model_validator

from prunet.denoisers.patterns import match
from prunet.disk.values import Value
from prunet.errors import UserError

#: How closely student and teacher are compared; an architecture offers some of them (`Architecture.levels`).
Level = Literal["block", "layer", "attention", "transformer"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Pair:
    """A student module, and the teacher module that it is compared with. The term is named after the teacher's."""

    student: str
    teacher: str


class StagePairs(Value):
    """The pairs that a stage compares (`pairs.json`)."""

    pairs: list[Pair]

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, value: Any) -> Any:
        return {"pairs": value} if isinstance(value, list) else value


def term_factors(pairs: Sequence[Pair], weights: Mapping[str, float]) -> list[float]:
    """The factor of each pair's term: that of the last pattern that names its teacher module or a part around it, or 1.

    Raises:
        UserError: a pattern that names no pair.
    """
    factors = [1.0] * len(pairs)
    for pattern, weight in weights.items():
        named = [i for i, pair in enumerate(pairs) if match(pattern, _around(pair.teacher))]
        if not named:
            some = ", ".join(pair.teacher for pair in pairs[:3])
            raise UserError(f"losses.weights: {pattern!r} names no module that is compared; there are {some}, ...")
        for i in named:
            factors[i] = float(weight)
    return factors


def _around(name: str) -> list[str]:
    """`a.b.c` -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
