"""Budgets: limits for a student's parameters, MACs, bytes or latency."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunet.errors import UserError
from prunet.plan.effect import Size
from prunet.words import many, number

#: Maps each kind of cost to the units of its amounts, with their values; `%` is a share of the teacher's cost.
UNITS: dict[str, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "macs": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "size": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30},
    "latency": {"ms": 1, "s": 1e3},
}
EXAMPLES = "parameters=50%, macs=60%, latency=40%, size=1GB"


@dataclass(frozen=True)
class Budget:
    """The most that a student may cost: an `amount` in the units of `costs_of`, or a share of the teacher's cost."""

    kind: str
    amount: float
    is_share: bool

    def limit(self, teacher: Mapping[str, float]) -> float:
        """Returns the amount, for a teacher with these costs."""
        return self.amount * teacher[self.kind] if self.is_share else self.amount

    def __str__(self) -> str:
        return (
            f"{self.kind.replace('macs', 'MACs')} {100 * self.amount:g} %"
            if self.is_share
            else shown(self.kind, self.amount)
        )


def parse_budgets(texts: Sequence[str]) -> list[Budget]:
    """Parses budgets from texts such as `macs=60%`, at most one of each kind.

    Raises:
        UserError: there is no budget, or a text has another form.
    """
    if not texts:
        raise UserError(f"--budget: give at least one, or a --form: {EXAMPLES}")
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
        raise UserError(f"--budget {text}: must be more than nothing and less than the teacher: give another amount")
    return Budget(kind, amount, unit == "%")


def costs_of(size: Size, latency_ms: float | None = None) -> dict[str, float]:
    """Returns all costs: parameters, MACs of a call (with attention's), bytes in half precision, milliseconds."""
    macs = size.macs + size.attention_macs
    costs: dict[str, float] = {"parameters": size.parameters, "macs": macs, "size": 2 * size.parameters}
    return costs if latency_ms is None else {**costs, "latency": latency_ms}


def shown(kind: str, amount: float) -> str:
    """Formats an amount of a kind of cost with its unit: `338 G MACs`."""
    if kind == "latency":
        return f"{number(amount)} ms"
    return f"{number(amount / 1e6)} MB" if kind == "size" else f"{many(amount)} {kind.replace('macs', 'MACs')}"
