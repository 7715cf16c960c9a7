"""The rows of `students.py`, and its table: R@1, score, KID and distance of students, by their number of steps."""

from typing import Any

from prunet.disk.values import Value
from prunet.intervals import Measure, summary

PROTOCOLS = ("emoji-train", "emoji-heldout")
METRICS = {"retrieval": "R@1", "clip_score": "score", "kid": "KID"}


class Row(Value):
    """How a student of an ablation (arm `teacher`: the teacher) draws the prompts of a protocol in these steps.

    `recipe`: hash of what the student was trained by. `count`: of prompts. `distance` from the teacher's pictures,
    `half` of its interval.
    """

    arm: str
    seed: int
    recipe: str
    protocol: str
    count: int
    steps: int
    guidance: float
    measures: dict[str, Measure]
    distance: float
    half: float

    @property
    def key(self) -> tuple[Any, ...]:
        return self.arm, self.seed, self.protocol, self.count, self.steps, self.guidance


#: Rows by their keys.
Rows = dict[tuple[Any, ...], Row]


def cell(found: list[Measure]) -> str:
    """A metric's mean over seeds with half of its interval; with one seed, the interval over pictures."""
    if len(found) == 1:
        return f"{found[0].value:.3f} [{found[0].low:.3f}, {found[0].high:.3f}]"
    over = summary([f.value for f in found])
    return f"{over.mean:.3f} ± {over.interval:.3f}"


def line(rows: list[Row]) -> str:
    """The line of a table for one student in some steps; `rows`: those of its seeds."""
    first = rows[0]
    values = [cell([row.measures[metric] for row in rows]) for metric in METRICS]
    over = summary([row.distance for row in rows])
    values.append(f"{over.mean:.4f} ± {over.interval if len(rows) > 1 else first.half:.4f}")
    shown = f"{first.guidance:g}" if first.guidance > 1 else "none"
    return f"| {first.arm} | {first.steps} | {shown} | {len(rows)} | " + " | ".join(values) + " |"


def table(title: str, rows: list[Row], limit: int) -> str:
    text = [f"# {title}", ""]
    for protocol in PROTOCOLS:
        columns = ["", "steps", "guidance", "seeds", *METRICS.values(), "distance to the teacher's pictures"]
        text += [f"`{protocol}`, {limit} prompts at most:", "", f"| {' | '.join(columns)} |"]
        text += ["|---|" + "---:|" * (len(columns) - 1)]
        alike: dict[tuple[str, int, float], list[Row]] = {}
        for row in rows:
            if row.protocol == protocol:
                alike.setdefault((row.arm, row.steps, row.guidance), []).append(row)
        text += [*map(line, alike.values()), ""]
    return "\n".join(text)
