"""Pairs of modules that distillation compares, at several levels of detail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import model_validator

from prunet.denoisers.patterns import around, match
from prunet.disk.values import Value
from prunet.errors import UserError

#: How closely student and teacher are compared; each architecture has some of these levels (`Architecture.levels`).
Level = Literal["block", "layer", "attention", "transformer"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Pair:
    """A student module and the teacher module that it is compared with. Its loss term has the teacher module's name."""

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
    """Returns the factor of each pair's term, or 1.

    The last pattern that matches the pair's teacher module, or a module around it, gives the factor.

    Raises:
        UserError: a pattern matches no pair.
    """
    factors = [1.0] * len(pairs)
    for pattern, weight in weights.items():
        named = [i for i, pair in enumerate(pairs) if match(pattern, around(pair.teacher))]
        if not named:
            some = ", ".join(pair.teacher for pair in pairs[:3])
            raise UserError(f"losses.weights: {pattern!r} matches no module that is compared: match {some}, ...")
        for i in named:
            factors[i] = float(weight)
    return factors
