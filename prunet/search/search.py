"""The search for the plan with the least error within the budgets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from prunet.console import progress, say
from prunet.errors import UserError
from prunet.intervals import Measure
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import Plan, load_plan, preset_names
from prunet.runtime import Runtime
from prunet.search.budgets import costs_of
from prunet.search.choice import Problem, best_sets, needs_of, total
from prunet.search.examples import GUIDANCE
from prunet.search.recovery import recover
from prunet.search.results import ScoredPlan, SearchResult
from prunet.search.scores import Scores, key_of, teacher_ms
from prunet.search.sensitivity import open_examples, sensitivity
from prunet.search.space import ROUNDING, Space

#: Plans that are scored from each of the two choices; pairs of units that are scored; points of the frontier.
MOST_PLANS, MOST_PAIRS, POINTS = 8, 24, 6
#: Factors for the latency that the sums must save, if no plan that they found keeps the budget when it is timed.
TIGHTER = (0.0, 0.1, 0.2, 0.35)


@dataclass(frozen=True)
class Scored:
    """A plan with its costs, its error before training, and its errors after some steps of training."""

    derived: Derived
    costs: dict[str, float]
    error: Measure
    after: dict[int, float]

    @property
    def best(self) -> float:
        """Its error after the most steps, or before training if that is less: then the student stays untrained."""
        return min(self.error.value, self.after[max(self.after)] if self.after else np.inf)


def find_plan(
    space: Space,
    folder: Path,
    runtime: Runtime,
    *,
    prompts: Sequence[str] | None = None,
    cache: Path | None = None,
    recover_steps: int = 0,
    guidance_scale: float = GUIDANCE,
) -> tuple[Plan, SearchResult]:
    """Finds the plan; returns it and all results. Resumes in `folder`.

    Args:
        prompts, cache, guidance_scale: see `open_examples`; with `recover_steps` students learn from the cache and are
        scored on prompts. recover_steps: steps for which the best plans are distilled before one is chosen; 0: none.

    Raises:
        UserError: the teacher itself, or no timed plan, keeps the budget of latency.
    """
    if space.timed:
        space.check_latency(teacher_ms(space.teacher))
    file = folder / "examples.safetensors"
    examples = open_examples(space.teacher, prompts, None if recover_steps else cache, file, guidance_scale)
    scores = Scores(space.teacher, examples, folder)
    units = sensitivity(space.units, scores, timed=bool(space.timed))
    problem = space.problem(
        [unit.error for unit in units.units],
        [scores.latency(unit.derived) for unit in space.units] if space.timed else [],
        scores.teacher_latency if space.timed else 1.0,
    )
    found, presets = candidates(space, problem, scores), _presets(space, scores)
    known = {key_of(one.derived) for one in found}
    inside = [one for one in presets if within(space, one, scores) and key_of(one.derived) not in known]
    found = sorted([*found, *inside], key=lambda one: one.error.value)
    say(f"  {len(found)} plans within the budget; the best has error {found[0].error.value:.4g} before training")
    if recover_steps and cache is not None:
        after = recover([one.derived for one in found], scores, cache, recover_steps, folder / "recovery", runtime)
        found = [replace(one, after=after.get(key_of(one.derived), {})) for one in found]
        # A student that was dropped counts by its error before training: that after fewer steps is not compared.
        found.sort(key=lambda one: min(one.error.value, one.after.get(recover_steps, np.inf)))
    best = found[0]
    plan = Plan("found", best.derived.plan.remove, _described(space, best))
    frontier = _frontier(space, problem, scores)
    return plan, SearchResult(
        **dict(units),
        budgets=space.wanted,
        limits=space.all_limits(scores.teacher_latency if space.timed else 0.0),
        recover_steps=recover_steps,
        error_before=best.error.value,
        trained_is_better=best.best < best.error.value,
        plans=[_row(one) for one in found],
        presets=[_row(one) for one in presets],
        frontier=[_row(one) for one in frontier],
        remove=list(plan.remove),
        plan=derive(space.config, plan).result(),
    )


def _score(space: Space, derived: Derived, scores: Scores) -> Scored:
    latency = scores.latency(derived) if space.timed else None
    return Scored(derived, costs_of(derived.student_size, latency), scores.error(derived), {})


def within(space: Space, scored: Scored, scores: Scores) -> bool:
    """Returns whether a scored plan keeps all budgets, and has the form of the space."""
    limits = space.all_limits(scores.teacher_latency if space.timed else 0.0)
    keeps = all(scored.costs[kind] <= limit * ROUNDING for kind, limit in limits.items())
    return keeps and space.has_form(scored.derived)


def candidates(space: Space, problem: Problem, scores: Scores) -> list[Scored]:
    """Returns plans within the budgets with their measured errors, the best first.

    They are the plans with the least summed error: first from single units, then with the terms of pairs that these
    plans remove together.

    Raises:
        UserError: no timed plan keeps the budget of latency.
    """
    for tighter in TIGHTER if space.timed else TIGHTER[:1]:
        needs = dict(problem.needs) | {b.kind: problem.needs[b.kind] * (1 + tighter) for b in space.timed}
        if found := _rescored(space, replace(problem, needs=needs), scores):
            return found
    raise UserError("--budget latency: no timed plan keeps it: give more")


def _rescored(space: Space, problem: Problem, scores: Scores) -> list[Scored]:
    refusal = space.refusal(space.limits)
    single = best_sets(problem, refusal, MOST_PLANS)
    paired = replace(problem, pairs=_pairs(space, problem, single, scores))
    sets = dict.fromkeys([*best_sets(paired, refusal, MOST_PLANS), *single])
    found = []
    with progress("Scoring plans", len(sets)) as bar:
        for chosen in sorted(sets, key=lambda chosen: total(paired, chosen)):
            if (derived := space.together(chosen)) is not None:
                found.append(_score(space, derived, scores))
            bar.advance()
    return sorted((one for one in found if within(space, one, scores)), key=lambda one: one.error.value)


def _pairs(
    space: Space, problem: Problem, sets: Sequence[frozenset[int]], scores: Scores
) -> dict[tuple[int, int], float]:
    """Scores the worst pairs of units that `sets` remove together: the error of both minus the sum of their errors."""
    both = {pair for chosen in sets for pair in combinations(sorted(chosen), 2)}
    worst = sorted(both, key=lambda pair: (-total(problem, pair), pair))[:MOST_PAIRS]
    found = {}
    with progress("Scoring pairs", len(worst)) as bar:
        for pair in worst:
            if (derived := space.together(pair)) is not None:
                found[pair] = scores.error(derived).value - total(problem, pair)
            bar.advance()
    return found


def _presets(space: Space, scores: Scores) -> list[Scored]:
    """Scores the presets that fit the teacher, whether or not they keep the budgets."""
    found = []
    for name in preset_names():
        try:
            derived = derive(space.config, load_plan(name))
        except UserError:
            continue
        found.append(_score(space, derived, scores))
    return found


def _frontier(space: Space, problem: Problem, scores: Scores) -> list[Scored]:
    """Returns the best plans by the sums for budgets between the teacher's costs and the given ones, of any form."""
    found: dict[str, Derived] = {}
    for point in range(1, POINTS):
        share = point / POINTS
        limits = {kind: space.costs[kind] - share * (space.costs[kind] - most) for kind, most in space.limits.items()}
        needs = {kind: need * share for kind, need in problem.needs.items()} | needs_of(limits, space.costs)
        eased = replace(problem, needs=needs, exactly=())
        for chosen in best_sets(eased, space.refusal(limits, form=False), 1):
            if (derived := space.together(chosen)) is not None:
                found[key_of(derived)] = derived
    return [_score(space, derived, scores) for derived in found.values()]


def _row(scored: Scored) -> ScoredPlan:
    plan, error = scored.derived.plan, scored.error
    return ScoredPlan(
        name=plan.name,
        remove=list(plan.remove),
        costs=scored.costs,
        error=error.value,
        low=error.low,
        high=error.high,
        after=scored.after,
    )


def _described(space: Space, best: Scored) -> str:
    after = f", {best.after[max(best.after)]:.3g} after {max(best.after)} steps" if best.after else ""
    limits = [f"{budget} of the teacher's" if budget.is_share else str(budget) for budget in space.budgets]
    wanted = ", ".join(space.wanted if space.form else limits)
    return f"found for {wanted}: error {best.error.value:.3g} before training{after}"
