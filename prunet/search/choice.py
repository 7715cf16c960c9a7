"""The sets of units with the least error within a budget: a 0-1 program, solved exactly."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Returns the units of a set that may not be removed together; the whole set, if only the whole set fails.
Refusal = Callable[[frozenset[int]], "frozenset[int] | None"]


@dataclass
class Problem:
    """The choice of units to remove.

    `hurts`: error of each unit alone (n,). `savings` and `needs`: for each kind of cost, the shares of the teacher's
    cost that each unit saves (n,), and the share that must be saved. `pairs`: for units (i, j), the error of both
    together minus the sum of their errors. `exclude`: sets of units that may not be removed together. `exactly`: how
    many parts each unit removes from a list of parts, and how many must be removed from it.
    """

    hurts: Array
    savings: Mapping[str, Array]
    needs: Mapping[str, float]
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict)
    exclude: Iterable[frozenset[int]] = ()
    exactly: Sequence[tuple[Mapping[int, float], float]] = ()


def best_sets(problem: Problem, refusal: Refusal, count: int) -> list[frozenset[int]]:
    """Returns up to `count` sets of units with the least summed error, the best first; no set contains another.

    `refusal` is called for each set that the sums allow: only deriving a student shows whether units can be removed
    together, and the real cost of a set.
    """
    rows, lows, highs = _bounds(problem)
    size = len(problem.hurts) + len(problem.pairs)
    found: list[frozenset[int]] = []
    while len(found) < count:
        chosen = _solve(problem, np.array(rows).reshape(-1, size), np.array(lows), np.array(highs))
        if chosen is None:
            break
        apart = refusal(chosen)
        if apart is None:
            found.append(chosen)
        row = np.zeros(size)
        if apart == chosen:  # supersets of it may still be valid
            row[: len(problem.hurts)] = -1
            row[list(chosen)] = 1
            high = len(chosen) - 1
        else:
            row[list(apart or chosen)] = 1
            high = len(apart or chosen) - 1
        rows, lows, highs = [*rows, row], [*lows, -np.inf], [*highs, float(high)]
    return found


def total(problem: Problem, chosen: Iterable[int]) -> float:
    """Returns the summed error of a set, with the terms of its pairs."""
    chosen = set(chosen)
    pairs = sum(term for pair, term in problem.pairs.items() if chosen.issuperset(pair))
    return float(sum(problem.hurts[i] for i in chosen) + pairs)


def _bounds(problem: Problem) -> tuple[list[Array], list[float], list[float]]:
    """Returns the rows of the program with bounds: savings, counts, exclusions, and y = 1 if a pair is removed."""
    n, size = len(problem.hurts), len(problem.hurts) + len(problem.pairs)
    rows, lows, highs = [], [], []

    def bound(values: Mapping[int, float], low: float, high: float) -> None:
        row = np.zeros(size)
        for place, value in values.items():
            row[place] = value
        rows.append(row)
        lows.append(low)
        highs.append(high)

    for kind, need in problem.needs.items():
        bound(dict(enumerate(problem.savings[kind])), need - 1e-9, np.inf)
    for counts, wanted in problem.exactly:
        bound(counts, wanted, wanted)
    for together in problem.exclude:
        bound(dict.fromkeys(together, 1.0), -np.inf, len(together) - 1)
    for at, (i, j) in enumerate(problem.pairs, n):
        bound({i: 1, j: 1, at: -1}, -np.inf, 1)
        bound({i: -1, at: 1}, -np.inf, 0)
        bound({j: -1, at: 1}, -np.inf, 0)
    return rows, lows, highs


def _solve(problem: Problem, rows: Array, lows: Array, highs: Array) -> frozenset[int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    goal = np.array([*problem.hurts, *problem.pairs.values()])
    goal = goal * (1e3 / max(np.abs(goal).max(), 1e-30))  # the solver's tolerances are absolute
    whole = np.array([1] * len(problem.hurts) + [0] * len(problem.pairs))
    limits = LinearConstraint(rows, lows, highs) if len(rows) else ()
    found = milp(goal, integrality=whole, bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0})
    if found.x is None:
        return None
    return frozenset(int(i) for i in np.flatnonzero(found.x[: len(problem.hurts)] > 0.5))


def needs_of(limits: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """Maps each kind of cost to the share of the teacher's cost that must be saved to stay within the limit."""
    return {kind: 1 - limit / teacher[kind] for kind, limit in limits.items()}


def smallest_failing(chosen: frozenset[int], fails: Callable[[Sequence[int]], bool]) -> frozenset[int]:
    """Returns a smallest part of a set that still fails."""
    kept = sorted(chosen)
    for unit in sorted(chosen):
        if fails(rest := [other for other in kept if other != unit]):
            kept = rest
    return frozenset(kept)
