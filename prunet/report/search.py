"""A search as a page: the frontier of cost against error, the plan that was found, and the error of each removal."""

import math
from dataclasses import dataclass
from pathlib import Path

from prunet import __version__
from prunet.diagram import STEPS
from prunet.disk.files import write_text
from prunet.report import sensitivity
from prunet.report.charts import render
from prunet.search.budgets import shown
from prunet.search.results import ScoredPlan, SearchResult
from prunet.words import number, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 560, 84, 40, 104, 72  # pixels; the last four are margins
NAMES = {"parameters": "parameters", "macs": "MACs of a call", "size": "size in half precision", "latency": "latency"}
MOST_ROWS = 8  # found plans in the table
#: Kinds of points in the order in which they are plotted, and their names in the legend.
KINDS = {
    "single": "one unit removed",
    "sum": "found for an easier budget",
    "candidate": "found for this budget",
    "preset": "preset",
    "after": "after short training",
    "chosen": "chosen",
}


@dataclass(frozen=True)
class Dot:
    """A plan on the frontier: its cost as a share of the teacher's, its error, and a text beside it."""

    kind: str
    cost: float
    error: float
    label: str = ""
    tip: str = ""


def write_search(result: SearchResult, folder: Path) -> None:
    """Writes `frontier.svg` and `search.html`."""
    drawing = frontier(result)
    write_text(folder / "frontier.svg", drawing)
    page = render(
        "search.html.j2",
        version=__version__,
        teacher=short(result.teacher),
        result=result,
        frontier=drawing,
        rows=rows(result),
        kind=kind_of(result),
        names=NAMES,
        shown=shown,
        found=result.plan.diagram(),
        net=sensitivity.coloured_diagram(result),
        steps=STEPS,
        chart=sensitivity.chart(result),
        columns=sensitivity.columns(result),
    )
    write_text(folder / "search.html", page)


def rows(result: SearchResult) -> list[ScoredPlan]:
    """Returns the chosen plan, some others within the budget, and the presets."""
    best, *others = result.plans
    found = [row for row in others if row.name == "found"]
    trained = {row.name: row for row in result.plans}
    presets = [trained.get(row.name, row) for row in result.presets if row.name != best.name]
    return [best, *found[: MOST_ROWS - 1], *presets]


def kind_of(result: SearchResult) -> str:
    """Returns the kind of cost of the first budget, which the frontier shows."""
    return str(next(iter(result.limits)))


def dots(result: SearchResult) -> list[Dot]:
    """Returns a point for each plan that was scored, the chosen one last."""
    kind = kind_of(result)
    whole = result.costs[kind]

    def dot(what: str, row: ScoredPlan, error: float, label: str = "") -> Dot:
        cost = row.costs[kind]
        tip = f"{label or ', '.join(row.remove)}: {shown(kind, cost)}, error {number(error)}"
        return Dot(what, cost / whole, error, label, tip)

    singles = [
        Dot(
            "single",
            1 - unit.saves[kind] / whole,
            unit.error,
            "",
            f"{unit.name}: error {number(unit.error)}",
        )
        for unit in result.units
    ]
    found = [dot("sum", row, row.error) for row in result.frontier]
    found += [dot("candidate", row, row.error) for row in result.plans if row.name == "found"]
    found += [dot("preset", row, row.error, row.name) for row in result.presets]
    found += [dot("after", row, row.trained) for row in result.plans if row.trained is not None]
    best = result.plans[0]
    return [*singles, *found, dot("chosen", best, best.error, "the plan")]


def frontier(result: SearchResult) -> str:
    """Charts cost against error on a logarithmic scale; errors below the lowest tick lie on this tick."""
    points, kind = dots(result), kind_of(result)
    low = max(1e-6, min(point.error for point in points if point.error > 0))
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(max(1.0, *(point.error for point in points))))
    least: float = min([point.cost for point in points] + [result.limits[kind] / result.costs[kind]])
    left = math.floor(10 * least - 1e-9) / 10
    right = max(1.0, *(point.cost for point in points)) + 0.02

    def x(cost: float) -> float:
        return LEFT + (cost - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        height = (math.log10(max(error, math.pow(10, bottom))) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    marks = [
        # Names of presets that are near each other stand one above the other.
        {"dot": point, "x": x(point.cost), "y": y(point.error), "up": 8 + 15 * (place % 3)}
        for place, point in enumerate(points)
    ]
    used = [kind for kind in KINDS if any(point.kind == kind for point in points)]
    key, at = [], float(LEFT)
    for name in [*used, "teacher"]:
        key.append((name, KINDS.get(name, "teacher"), at))
        at += 34 + 6.4 * len(KINDS.get(name, "teacher"))
    return render(
        "frontier.svg.j2",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        title=f"Plans for {short(result.teacher)}",
        soft=f"error of the untrained student by its {NAMES[kind]}; down and to the left is better",
        marks=marks,
        teacher=(x(1.0), y(0.0)),
        limit=x(result.limits[kind] / result.costs[kind]),
        budget=", ".join(result.budgets),
        x_ticks=[(x(share / 10), f"{10 * share} %") for share in range(round(10 * left), 11)],
        y_ticks=[(y(10.0**power), f"{10.0**power:g}") for power in range(bottom, top + 1)],
        across=f"{NAMES[kind]}, share of the teacher's ({shown(kind, result.costs[kind])})",
        key=key,
    )
