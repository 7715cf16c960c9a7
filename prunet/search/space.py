"""The space of a search: the units, their costs, and which of them can be removed together."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from prunet.console import progress
from prunet.denoisers.patterns import is_within
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

    `keep`: patterns of parts that must stay. `form`: only plans are in the space whose students have the form of this
    plan's, and so its costs; `budgets` are then those of its parameters and MACs.

    Raises:
        UserError: a pattern matches nothing, no plan keeps a budget, or none with units has the form.
    """

    def __init__(
        self, teacher: Teacher, budgets: Sequence[Budget], keep: Sequence[str] = (), form: Plan | None = None
    ) -> None:
        self.teacher, self.budgets, self.config = teacher, budgets, teacher.unet_config
        self.form = _form_of(self.config, form) if form else None
        whole = derive(self.config, Plan("none"))
        self.costs: dict[str, float] = costs_of(whole.teacher_size)
        if self.form:
            costs = costs_of(self.form.student_size)
            self.budgets = [Budget(kind, costs[kind], is_share=False) for kind in ("parameters", "macs")]
        budgets = self.budgets
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
        free = [self._free(unit.parts) for unit in self.units]
        pairs = combinations(enumerate(free), 2)
        self._exclude = [frozenset((i, j)) for (i, a), (j, b) in pairs if overlap(a, b)]
        self._derived: dict[frozenset[int], Derived | None] = {}
        self._check_budgets()

    def together(self, chosen: Sequence[int] | frozenset[int]) -> Derived | None:
        """Derives the student without all chosen units; None if they cannot be removed together."""
        key = frozenset(chosen)
        if key not in self._derived:
            every = [part for i in sorted(key) for part in self.units[i].parts]
            parts = [part for part in every if not is_within(part.rpartition(".")[0], every)]
            try:
                self._derived[key] = derive(self.config, Plan("found", tuple(patterns_of(parts))))
            except UserError:
                self._derived[key] = None
        return self._derived[key]

    def _free(self, parts: Iterable[str]) -> list[str]:
        """Returns the parts that are not inside a part that the form lacks anyway."""
        gone = self.form.removed if self.form else ()
        return [part for part in parts if not is_within(part.rpartition(".")[0], gone)]

    @property
    def wanted(self) -> list[str]:
        """Returns what a plan must keep, as texts: the budgets, or the form."""
        return [f"the form of {self.form.plan.name}"] if self.form else list(map(str, self.budgets))

    def has_form(self, derived: Derived) -> bool:
        """Returns whether a student has the form of the space, if it has one."""
        return self.form is None or derived.student_config == self.form.student_config

    def refusal(self, limits: Mapping[str, float], *, form: bool = True) -> Refusal:
        """Returns a function that says why a set of units is not a plan within `limits`, by kind of cost.

        `form`: refuse other forms than that of the space, if it has one.
        """

        def why_not(chosen: frozenset[int]) -> frozenset[int] | None:
            derived = self.together(chosen)
            if derived is None:
                return smallest_failing(chosen, lambda some: self.together(some) is None)
            if form and not self.has_form(derived):
                return chosen
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
        # Errors and costs are added up; the form says more exactly than the sum of costs what must be removed.
        needs = {} if self.form else needs_of(self.limits, self.costs)
        if latencies:
            savings["latency"] = 1 - np.array(latencies) / teacher_latency
            whole = {"latency": teacher_latency}
            needs |= needs_of({budget.kind: budget.limit(whole) for budget in self.timed}, whole)
        return Problem(np.array(hurts), savings, needs, {}, self._exclude, self._counts())

    def _counts(self) -> list[tuple[dict[int, float], float]]:
        """Returns how many parts each unit removes from each list of parts, and how many the form lacks there."""
        if self.form is None:
            return []
        lists = [Counter(part.rpartition(".")[0] for part in self._free(unit.parts)) for unit in self.units]
        lacks = Counter(part.rpartition(".")[0] for part in self._free(self.form.removed))
        names = dict.fromkeys([*lacks, *(name for found in lists for name in found)])
        return [({i: found[name] for i, found in enumerate(lists) if name in found}, lacks[name]) for name in names]

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
        if self.form:
            raise UserError(
                f"--form {self.form.plan.name}: {self.teacher.source} has no parts to exchange for those that "
                "it removes: distil that plan itself"
            )
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


def _form_of(config: Mapping[str, Any], plan: Plan) -> Derived:
    try:
        return derive(config, plan)
    except UserError as error:
        raise UserError(f"--form {plan.name}: {error}") from error


def _check_needed(budget: Budget, teacher: Mapping[str, float]) -> None:
    """Refuses a budget that a teacher with these costs keeps."""
    if budget.limit(teacher) >= teacher[budget.kind]:
        has = shown(budget.kind, teacher[budget.kind])
        raise UserError(f"--budget {budget}: the teacher has {has}, which is within it: give less")
