"""The results of scoring a denoiser's units (`sensitivity.json`), and of a search (`search.json`).

Costs are amounts by kind, from `prunet.search.budgets.costs_of`. Errors are squared errors of the output divided by the
teacher's squared output, before training, with their 95 % interval from `low` to `high`.
"""

from typing import Any

from prunet.disk.values import Value
from prunet.plan.result import PlanResult

Costs = dict[str, int | float]


class UnitResult(Value):
    """A unit: the parts that it removes, the costs that this saves, and its error."""

    name: str
    remove: list[str]
    saves: Costs
    error: float
    low: float
    high: float


class Sensitivity(Value):
    """The costs and errors of a denoiser's units, in the denoiser's order, and the conditions of the measurement."""

    teacher: str
    teacher_config: dict[str, Any]
    costs: Costs
    examples: str
    device: str
    precision: str
    units: list[UnitResult]


class ScoredPlan(Value):
    """A plan: its patterns, the student's costs, its error before training, and its errors `after` some steps."""

    name: str
    remove: list[str]
    costs: Costs
    error: float
    low: float
    high: float
    after: dict[int, float]

    @property
    def trained(self) -> float | None:
        """The error after the most steps; None if it was not trained."""
        return self.after[max(self.after)] if self.after else None


class SearchResult(Sensitivity):
    """The result of a search: plans within the budgets, the chosen one first; presets; plans for easier budgets."""

    budgets: list[str]
    limits: Costs
    recover_steps: int
    error_before: float
    trained_is_better: bool
    plans: list[ScoredPlan]
    presets: list[ScoredPlan]
    frontier: list[ScoredPlan]
    remove: list[str]
    plan: PlanResult
