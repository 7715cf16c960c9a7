"""The curves of a run, made from the logs of all its stages."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from prunet.denoisers.pairs import StagePairs
from prunet.disk.seals import file_checksum
from prunet.disk.steps import Step
from prunet.errors import UserError
from prunet.report.charts import Point, Row, draw_chart, thin
from prunet.training.log import read_log
from prunet.words import number

Axis = list[list[tuple[float, Row]]]  # for each stage the rows of its log, with steps counted over all stages
SERIES = {"loss": "total", "task": "task", "output": "output", "feature": "feature"}
MOST_TIPS = 80  # in a chart


def read_logs(stages: list[Path], steps: Mapping[str, Step]) -> Axis:
    """Reads the logs of all stages onto one axis: a stage begins where the last one ended.

    `steps`: the finished steps of the run.

    Raises:
        UserError: a log was changed after its stage ended, or a row of it is damaged.
    """
    for stage in stages:
        log, step = stage / "log.jsonl", steps.get(stage.name)
        if step and step.log and log.is_file() and file_checksum(log) != step.log:
            raise UserError(
                f"{log}: damaged or changed (its checksum differs from the end of the stage): delete it (the charts "
                f"will lack its rows), or delete {stage} to train it again"
            )
    logs = [read_log(log) if (log := stage / "log.jsonl").is_file() else [] for stage in stages]
    for stage, rows in zip(stages, logs, strict=True):
        if any("loss" not in row for row in rows):
            raise UserError(f"{stage / 'log.jsonl'}: rows without losses: delete {stage} to train it again")
    starts = accumulate((log[-1]["step"] if log else 0 for log in logs), initial=0)
    return [[(start + row["step"], row) for row in log] for start, log in zip(starts, logs, strict=False)]


def segments(axis: Axis, key: str) -> list[list[Point]]:
    """Returns one line for each stage, without values that a logarithmic scale cannot show (an unused loss is 0)."""
    return [[(x, row[key]) for x, row in stage if 0 < row.get(key, 0) < math.inf] for stage in axis]


def loss_chart(axis: Axis) -> dict[str, Any] | None:
    """Plots the losses over the steps of all stages."""
    rows = [row for stage in axis for row in stage]
    tips = [
        (x, f"step {x:,}: " + ", ".join(f"{label} {number(row[key])}" for key, label in SERIES.items() if key in row))
        for x, row in thin(rows, MOST_TIPS)
    ]
    right = rows[-1][0] if rows else 0
    chart = draw_chart({label: segments(axis, key) for key, label in SERIES.items()}, right, tips, smooth=True)
    starts = [0, *(stage[-1][0] if stage else 0 for stage in axis[:-1])]
    stages = [(100 * x / right, f"stage {i}") for i, x in enumerate(starts, 1) if chart and len(axis) > 1]
    return chart and chart | {"x_ticks": step_ticks(right), "stages": stages}


def step_ticks(right: float) -> list[tuple[float, str]]:
    """Returns about five round numbers of steps, with their places in percent."""
    size = 10 ** math.floor(math.log10(right / 5))
    every = max(1, next(m * size for m in (1, 2, 5, 10) if m * size >= right / 5))
    return [(100 * x * every / right, f"{x * every:,.0f}") for x in range(int(right / every) + 1)]


def level_chart(by_level: Mapping[str, list[float]], levels: list[float]) -> dict[str, Any] | None:
    """Plots the denoiser's distance over the noise schedule, one line for each name."""
    lines = {name: [[(100 * x, y) for x, y in zip(levels, ys, strict=False) if y > 0]] for name, ys in by_level.items()}
    tips = [
        (100 * x, f"noise level {x:.0%}: " + ", ".join(f"{name} {number(ys[i])}" for name, ys in by_level.items()))
        for i, x in enumerate(levels)
    ]
    chart = draw_chart(lines, 100, tips)
    return chart and chart | {"x_ticks": [(x, f"{x} %") for x in range(0, 101, 20)], "stages": []}


def pair_rows(axis: Axis, stages: list[Path]) -> list[dict[str, Any]]:
    """Returns the feature loss of each pair of any stage: the first and last value, and its chart."""
    files = [path for stage in stages if (path := stage / "pairs.json").is_file()]
    pairs = {pair.teacher: pair for path in files for pair in StagePairs.load(path).pairs}
    rows = []
    for pair in pairs.values():
        ways = segments(axis, f"feature/{pair.teacher}")
        chart = draw_chart({"feature": ways}, max((x for s in ways for x, _ in s), default=0), [], smooth=True)
        if chart:
            first = next(s[0][1] for s in ways if s)
            rows.append({**asdict(pair), "chart": chart, "first": first, "last": chart["lines"][0]["last"]})
    return rows
