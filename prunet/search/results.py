"""What is found of a denoiser's units (`sensitivity.json`), and by a search (`search.json`).

Costs are amounts by kind, as `prunet.search.budgets.costs_of` gives them. Errors are squared errors of the output over
the teacher's squared output, before training, with their 95 % interval from `low` to `high`.
"""

from typing import Any

from prunet.disk.values import Value
from prunet.plan.result import PlanResult

Costs = dict[str, int | float]


class UnitResult(Value):
    """A unit: the parts that it removes, what that saves, and the error."""

    name: str
    remove: list[str]
    saves: Costs
    error: float
    low: float
    high: float


class Sensitivity(Value):
    """What each unit of a denoiser costs and hurts, in the denoiser's order, and on what that was measured."""

    teacher: str
    teacher_config: dict[str, Any]
    costs: Costs
    examples: str
    device: str
    precision: str
    units: list[UnitResult]


class ScoredPlan(Value):
    """A plan: the patterns that it removes, the student's costs, and its error before and `after` so many steps."""

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
    """What a search found: plans within the budgets, the chosen one first; presets; plans for easier budgets."""

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
