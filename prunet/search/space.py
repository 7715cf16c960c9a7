"""The space of a search: the units, their costs, and which of them can be removed together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from prunet.console import progress
from prunet.errors import UserError
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import Plan
from prunet.search.budgets import Budget, costs_of, shown
from prunet.search.choice import Problem, Refusal, best_sets, needs_of, smallest_failing
from prunet.search.units import find_units, overlap, patterns_of
from prunet.teacher.teacher import Teacher

#: Tolerance for rounding of a cost that is a share of another.
ROUNDING = 1 + 1e-12


class Space:
    """The plans that a search chooses from: sets of units, with costs. Its creation checks all that needs no weights.

    `keep`: patterns of parts that must stay.

    Raises:
        UserError: a pattern matches nothing, or no plan keeps a budget.
    """

    def __init__(self, teacher: Teacher, budgets: Sequence[Budget], keep: Sequence[str] = ()) -> None:
        self.teacher, self.budgets, self.config = teacher, budgets, teacher.unet_config
        whole = derive(self.config, Plan("none"))
        self.costs: dict[str, float] = costs_of(whole.teacher_size)
        self.limits = {budget.kind: budget.limit(self.costs) for budget in budgets if budget.kind != "latency"}
        for budget in budgets:
            if budget.kind in self.costs:
                _check_needed(budget, self.costs)
        self.units = find_units(self.config, keep)
        if not self.units:
            raise UserError(f"{teacher.source}: nothing can be removed" + (" beside --keep" if keep else ""))
        with progress("Costs of units", len(self.units)) as bar:
            for unit in self.units:
                _ = unit.derived.student_size
                bar.advance()
        pairs = combinations(enumerate(self.units), 2)
        self._exclude = [frozenset((i, j)) for (i, a), (j, b) in pairs if overlap(a.parts, b.parts)]
        self._derived: dict[frozenset[int], Derived | None] = {}
        self._check_budgets()

    def together(self, chosen: Sequence[int] | frozenset[int]) -> Derived | None:
        """Derives the student without all chosen units; None if they cannot be removed together."""
        key = frozenset(chosen)
        if key not in self._derived:
            parts = [part for i in sorted(key) for part in self.units[i].parts]
            try:
                self._derived[key] = derive(self.config, Plan("found", tuple(patterns_of(parts))))
            except UserError:
                self._derived[key] = None
        return self._derived[key]

    def refusal(self, limits: Mapping[str, float]) -> Refusal:
        """Returns a function that says why a set of units is not a plan within `limits`, by kind of cost."""

        def why_not(chosen: frozenset[int]) -> frozenset[int] | None:
            derived = self.together(chosen)
            if derived is None:
                return smallest_failing(chosen, lambda some: self.together(some) is None)
            costs = costs_of(derived.student_size)
            if any(costs[kind] > limit * ROUNDING for kind, limit in limits.items()):
                return chosen
            try:
                derived.result()  # fails if a run could not write the pairs of all levels
            except UserError:
                return chosen
            return None

        return why_not

    def problem(self, hurts: Sequence[float], latencies: Sequence[float] = (), teacher_latency: float = 1.0) -> Problem:
        """Returns the choice of units by their errors; `latencies`: ms without each unit, if latency has a budget."""
        left = [costs_of(unit.derived.student_size) for unit in self.units]
        savings = {kind: np.array([1 - costs[kind] / amount for costs in left]) for kind, amount in self.costs.items()}
        needs = needs_of(self.limits, self.costs)
        if latencies:
            savings["latency"] = 1 - np.array(latencies) / teacher_latency
            whole = {"latency": teacher_latency}
            needs |= needs_of({budget.kind: budget.limit(whole) for budget in self.timed}, whole)
        return Problem(np.array(hurts), savings, needs, {}, self._exclude)

    @property
    def timed(self) -> list[Budget]:
        """Returns the budget of latency, if there is one."""
        return [budget for budget in self.budgets if budget.kind == "latency"]

    def check_latency(self, teacher_latency: float) -> None:
        """Refuses a budget of latency that the teacher keeps.

        Raises:
            UserError: there is such a budget.
        """
        for budget in self.timed:
            _check_needed(budget, {"latency": teacher_latency})

    def all_limits(self, teacher_latency: float) -> dict[str, float]:
        """Returns the limit of each kind of cost that has a budget."""
        whole = self.costs | {"latency": teacher_latency}
        return {budget.kind: budget.limit(whole) for budget in self.budgets}

    def _check_budgets(self) -> None:
        """Refuses budgets that no plan keeps; latency is not known yet."""
        units = len(self.units)
        if not self.limits or best_sets(self.problem([1.0] * units), self.refusal(self.limits), 1):
            return
        for kind, limit in self.limits.items():
            free = replace(self.problem([0.0] * units), needs={})
            found = best_sets(replace(free, hurts=-free.savings[kind]), self.refusal({}), 1)
            derived = self.together(found[0]) if found else None
            least = costs_of(derived.student_size)[kind] if derived else self.costs[kind]
            if least > limit:
                raise UserError(
                    f"--budget {kind}: no plan keeps {shown(kind, limit)}: the smallest student has "
                    f"{shown(kind, least)}, {100 * least / self.costs[kind]:.1f} % of the teacher's: give more"
                )
        raise UserError("--budget: no plan keeps all of these together: give more of one")


def _check_needed(budget: Budget, teacher: Mapping[str, float]) -> None:
    """Refuses a budget that a teacher with these costs keeps."""
    if budget.limit(teacher) >= teacher[budget.kind]:
        has = shown(budget.kind, teacher[budget.kind])
        raise UserError(f"--budget {budget}: the teacher has {has}, which is within it: give less")
