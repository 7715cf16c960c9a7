"""Budgets: how much of the teacher's parameters, MACs, bytes or latency a student may have at most."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunet.errors import UserError
from prunet.plan.effect import Size
from prunet.words import many, number

#: Kind of cost -> suffixes of its numbers and what they stand for; `%` is a share of the teacher's.
UNITS: dict[str, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "macs": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30},
    "latency": {"ms": 1, "s": 1e3},
}
EXAMPLES = "parameters=50%, macs=60%, latency=40%, size=1GB"


@dataclass(frozen=True)
class Budget:
    """The most that a student may cost: an `amount` as `costs_of` gives it, or a share of the teacher's."""

    kind: str
    amount: float
    is_share: bool

    def limit(self, teacher: Mapping[str, float]) -> float:
        """The amount, for a teacher of these costs."""
        return self.amount * teacher[self.kind] if self.is_share else self.amount

    def __str__(self) -> str:
        return (
            f"{self.kind.replace('macs', 'MACs')} {100 * self.amount:g} %"
            if self.is_share
            else shown(self.kind, self.amount)
        )


def parse_budgets(texts: Sequence[str]) -> list[Budget]:
    """The budgets in texts like `macs=60%`, one of each kind at most.

    Raises:
        UserError: none, or one that is not of this form.
    """
    if not texts:
        raise UserError(f"--budget: give at least one: {EXAMPLES}")
    found = [_parse(text) for text in texts]
    kinds = [budget.kind for budget in found]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UserError(f"--budget: two budgets of {twice}: give one")
    return found


def _parse(text: str) -> Budget:
    kind, sign, value = text.partition("=")
    kind = kind.strip().lower()
    if not sign or kind not in UNITS:
        raise UserError(f"--budget {text}: write one of {EXAMPLES}")
    units = UNITS[kind]
    form = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(%|[A-Za-z]*)\s*", value)
    unit = form and next((u for u in ("%", *units) if u.lower() == form[2].lower()), None)
    if form is None or unit is None:
        known = ", ".join(name for name in units if name)
        raise UserError(f"--budget {text}: give a number and %, {known}, such as {kind}=50%")
    amount = float(form[1]) * (0.01 if unit == "%" else units[unit])
    if amount <= 0 or (unit == "%" and amount >= 1):
        raise UserError(f"--budget {text}: a student has more than nothing and less than its teacher")
    return Budget(kind, amount, unit == "%")


def costs_of(size: Size, latency_ms: float | None = None) -> dict[str, float]:
    """Kind of cost -> amount: parameters, MACs of a call (attention's too), bytes in half precision, milliseconds."""
    macs = size.macs + size.attention_macs
    costs: dict[str, float] = {"parameters": size.parameters, "macs": macs, "size": 2 * size.parameters}
    return costs if latency_ms is None else {**costs, "latency": latency_ms}


def shown(kind: str, amount: float) -> str:
    """An amount of a kind of cost with its unit: `338 G MACs`."""
    if kind == "latency":
        return f"{number(amount)} ms"
    return f"{number(amount / 1e6)} MB" if kind == "size" else f"{many(amount)} {kind.replace('macs', 'MACs')}"
