"""The results of scoring a denoiser's units (`sensitivity.json`), and of a search (`search.json`).

Costs are amounts by kind, from `prunet.search.budgets.costs_of`. Errors are squared errors of the output divided by the
teacher's squared output, before training, with their 95 % interval from `low` to `high`.
"""

from typing import Any

from prunet.denoisers.known import architecture_of
from prunet.disk.values import Value
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.plan.result import PlanResult

Costs = dict[str, int | float]

#: Above this error the order of plans can turn with training. On emoji-xl 0.06 stayed better than 1.6, and 0.46 than
#: 1.9. On emoji-sd 0.87 became far worse than 1.6, and such a plan has only 0.33 if outputs are compared at guidance
#: scale 1.5 (benchmarks/2026-11-27-plans.md). A warning too many costs less than one too few.
MOST_ERROR = 0.1
BROKEN = (
    "Before training even the best student within the budget is far from the teacher (in errors 0 is equal, and 1 an "
    "output of zeros). Another plan may be the best after training: search with --recover 100 and --cache RUN, or "
    "train the presets within the budget too, and compare."
)


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

    @property
    def warnings(self) -> list[str]:
        """What a user should know before training: `BROKEN`, programs that load the teacher but not the student."""
        whole = derive(self.teacher_config, Plan("none")).loads_in
        lost = [name for name, answer in self.plan.loads_in.items() if answer.startswith("no") and whole[name] == "yes"]
        said = [BROKEN] if self.is_broken else []
        if lost:
            said.append(
                f"Unlike the teacher, a student by this plan does not load in {' and '.join(lost)}. With --form and a "
                "preset, search finds a plan whose student loads wherever the preset's does."
            )
        return said

    @property
    def is_broken(self) -> bool:
        """Whether the plan was chosen before training by an error that is too large to choose by (`BROKEN`)."""
        return self.is_trainable and self.error_before > MOST_ERROR and not self.plans[0].after

    @property
    def is_trainable(self) -> bool:
        """Whether prunet can train the student, and not only build it."""
        return not architecture_of(self.teacher_config).only_form
