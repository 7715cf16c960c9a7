"""The report of a run: one page that holds all it shows, made from the run folder alone."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from prunet import __version__, unet
from prunet.files import read_json, write_text
from prunet.training import read_log

Row = Mapping[str, Any]
Point = tuple[float, float]
Axis = list[list[tuple[float, Row]]]  # by stage: rows of its log, each with its place among the steps of all
COLUMNS = {"teacher": "teacher", "before": "student before", "after": "student after"}
SERIES = {"loss": "total", "task": "task", "output": "output", "feature": "feature"}
PICTURE_SIDE, SHEET_SIDE, MOST_SHEETS = 384, 1200, 6  # longest sides in pixels; sheets of a stage
MOST_POINTS, MOST_TIPS = 500, 80  # of a line; of a chart


def write_report(folder: Path | str) -> Path:
    """Writes `report.html` into a run folder from what lies there; the page needs no other file and no network.

    Raises:
        UserError: the run is not that far: no plan or no evaluation there, or not readable.
    """
    folder = Path(folder)
    plan = read_json(folder / "plan.json")
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_text)
    steps = read_json(path) if (path := folder / "steps.json").is_file() else {}
    stages = [folder / f"stage-{number}" for number in range(1, len(recipe["stages"]) + 1)]
    axis = _read_logs(stages)
    loader, undefined = jinja2.PackageLoader("prunet", "."), jinja2.StrictUndefined
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=undefined)
    env.filters |= {"number": _number, "many": _many, "percent": _percent, "duration": _duration}
    page = env.get_template("report.html.j2").render(
        version=__version__,
        teacher=_short(recipe["teacher"]["source"]),
        recipe=recipe,
        recipe_text=recipe_text,
        plan=plan,
        evaluation=evaluation,
        columns=COLUMNS,
        pictures=_pictures(folder / "evaluation" / "pictures", evaluation),
        net=_unet(plan),
        losses=_loss_chart(axis),
        pairs=_pair_rows(axis, stages),
        sheets=[_sheets(stage / "sheets") for stage in stages],
        levels=_level_chart(evaluation["distance"], evaluation["protocol"]["levels"]),
        times={name: step["seconds"] for name, step in steps.items()},
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


# -- numbers as text


def _number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, thousands apart, and an exponent only below 0.0001."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 9.99 may become 10
    return f"{value:.1e}" if size < -4 else f"{value:,.{max(0, digits - 1 - size)}f}"


def _many(count: float, digits: int = 3) -> str:
    """As the field says it: 266 k, 2,567 M parameters, 338 G multiply-adds."""
    unit, scale = ("G", 1e9) if count >= 1e10 else ("M", 1e6) if count >= 1e6 else ("k", 1e3)
    return f"{_number(count / scale, digits)} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    scale, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{_number(seconds / scale, 2)} {unit}"


def _short(source: str) -> str:
    """A hub id as it is; of a path only the last name, for where it lies on a disk is nobody's business."""
    parts = source.replace("\\", "/").rstrip("/").split("/")
    return source if len(parts) == 2 and parts[0] not in (".", "..", "", "~") else parts[-1]


# -- pictures


def _inline(path: Path, side: int) -> dict[str, Any] | None:
    """A picture as a data URI, no larger than it is shown: PNG when tiny, else WebP; None when it is not there."""
    if not path.is_file():
        return None
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(picture.size) <= 64 else "webp"
    data = io.BytesIO()
    picture.save(data, kind, **({"optimize": True} if kind == "png" else {"quality": 86, "method": 6}))
    text = base64.b64encode(data.getvalue()).decode()
    return {"src": f"data:image/{kind};base64,{text}", "width": picture.width, "height": picture.height}


def _pictures(folder: Path, evaluation: Row) -> list[dict[str, Any]]:
    """Each prompt with what teacher and student (before, after) drew of it, and how far they are apart."""
    return [
        {
            "prompt": prompt,
            "cells": {name: _inline(folder / name / f"{i:04d}.png", PICTURE_SIDE) for name in COLUMNS},
            "errors": {name: d["picture_by_prompt"][i] for name, d in evaluation["distance"].items()},
        }
        for i, prompt in enumerate(evaluation["protocol"]["prompts"])
    ]


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Some of the sheets drawn while training, the first and the last among them."""
    chosen = _thin(sorted(folder.glob("step-*.png")), MOST_SHEETS)
    return [{"step": int(p.stem.removeprefix("step-")), **(_inline(p, SHEET_SIDE) or {})} for p in chosen]


def _thin(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly chosen, with both ends."""
    count = len(values)
    return list(values) if count <= most else [values[round(i * (count - 1) / (most - 1))] for i in range(most)]


# -- the U-Net


def _unet(plan: Row) -> dict[str, Any]:
    """Its stages in rows, each down stage beside its mirrored up stage; the mid stage; and how many parts stay."""
    config = plan["teacher_config"]
    net, gone = unet.skeleton(config), set(plan["removed"]) | set(plan["implied"])
    count, widths = len(net.down_blocks), config["block_out_channels"]
    down = [_stage(f"down_blocks.{i}", net, gone) for i in range(count)]
    up = [_stage(f"up_blocks.{i}", net, gone) for i in range(count)]
    mid = _stage("mid_block", net, gone) if net.mid_block is not None else None
    stages = [*down, *up, *([mid] if mid else [])]
    parts = [part for stage in stages for layer in stage["layers"] for part in layer]
    stays = {kind: [not p["gone"] for p in parts if p["kind"] == kind] for kind in ("resnet", "attention")}
    blocks = [stays for p in parts for stays in p["blocks"]]
    if len(blocks) > len(stays["attention"]):
        stays["transformer block"] = blocks
    return {
        "rows": [{"width": widths[i], "down": down[i], "up": up[-1 - i]} for i in range(count)],
        "mid": mid,
        "mid_width": widths[-1],
        "largest": max(stage["parameters"] for stage in stages),
        "tally": {kind: (sum(which), len(which)) for kind, which in stays.items() if which},
    }


def _is_gone(name: str, gone: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in gone for end in range(1, len(parts) + 1))


def _stage(name: str, net: Any, gone: set[str]) -> dict[str, Any]:
    block = net.get_submodule(name)
    attentions = getattr(block, "attentions", None) or []
    layers = []
    for j, resnet in enumerate(block.resnets):
        layer = [_part("resnet", f"{name}.resnets.{j}", resnet, gone)]
        # The mid stage has one attention less than resnets; in the others every resnet may have one behind it.
        if j < len(attentions) and attentions[j] is not None:
            layer.append(_part("attention", f"{name}.attentions.{j}", attentions[j], gone))
        layers.append(layer)
    for kind in ("downsampler", "upsampler"):
        if getattr(block, f"{kind}s", None) is not None:
            layers.append([_part(kind, f"{name}.{kind}s.0", getattr(block, f"{kind}s"), gone)])
    sizes = {n: p.numel() for n, p in block.named_parameters(prefix=name)}
    kept = sum(size for n, size in sizes.items() if not _is_gone(n, gone))
    facts = {"parameters": sum(sizes.values()), "kept": kept}
    return {"name": name, "gone": _is_gone(name, gone), "layers": layers, **facts}


def _part(kind: str, name: str, module: Any, gone: set[str]) -> dict[str, Any]:
    """A resnet, attention or sampler; `blocks` says of each transformer block in it whether it stays."""
    is_gone = _is_gone(name, gone)
    depth = len(getattr(module, "transformer_blocks", []))
    blocks = [not _is_gone(f"{name}.transformer_blocks.{b}", gone) for b in range(depth)]
    title = f"{name}: {_many(sum(p.numel() for p in module.parameters()))} parameters, "
    title += "removed" if is_gone else "kept" if all(blocks) else f"{sum(blocks)} of {depth} transformer blocks kept"
    return {"kind": kind, "name": name, "gone": is_gone, "blocks": blocks, "title": title}


# -- charts


def _read_logs(stages: list[Path]) -> Axis:
    """The logs of all stages on one axis: a stage begins where the last one ended."""
    logs = [read_log(log) if (log := stage / "log.jsonl").is_file() else [] for stage in stages]
    starts = accumulate((log[-1]["step"] if log else 0 for log in logs), initial=0)
    return [[(start + row["step"], row) for row in log] for start, log in zip(starts, logs, strict=False)]


def _segments(axis: Axis, key: str) -> list[list[Point]]:
    """One line a stage, without what a logarithmic scale has no place for (0: a loss that is not used)."""
    return [[(x, row[key]) for x, row in stage if 0 < row.get(key, 0) < math.inf] for stage in axis]


def _loss_chart(axis: Axis) -> dict[str, Any] | None:
    """The losses over the steps of all stages."""
    rows = [row for stage in axis for row in stage]
    tips = [
        (x, f"step {x:,}: " + ", ".join(f"{label} {_number(row[key])}" for key, label in SERIES.items()))
        for x, row in _thin(rows, MOST_TIPS)
    ]
    right = rows[-1][0] if rows else 0
    chart = _chart({label: _segments(axis, key) for key, label in SERIES.items()}, right, tips, smooth=True)
    if chart:
        size = 10 ** math.floor(math.log10(right / 5))
        every = max(1, next(m * size for m in (1, 2, 5, 10) if m * size >= right / 5))
        chart["x_ticks"] = [(100 * x * every / right, f"{x * every:,.0f}") for x in range(int(right / every) + 1)]
        starts = [0, *(stage[-1][0] if stage else 0 for stage in axis[:-1])]
        chart["stages"] = [(100 * x / right, f"stage {i}") for i, x in enumerate(starts, 1) if len(axis) > 1]
    return chart


def _level_chart(distance: Row, levels: list[float]) -> dict[str, Any] | None:
    values = {name: distance[name]["denoiser_by_level"] for name in ("before", "after")}
    lines = {name: [[(100 * x, y) for x, y in zip(levels, ys, strict=False) if y > 0]] for name, ys in values.items()}
    tips = [
        (100 * x, f"noise level {x:.0%}: " + ", ".join(f"{name} {_number(ys[i])}" for name, ys in values.items()))
        for i, x in enumerate(levels[: len(values["after"])])
    ]
    chart = _chart(lines, 100, tips)
    return chart and chart | {"x_ticks": [(x, f"{x} %") for x in range(0, 101, 20)], "stages": []}


def _pair_rows(axis: Axis, stages: list[Path]) -> list[dict[str, Any]]:
    """The feature loss of each pair of any stage: first and last value, and its way between them."""
    rows, found = [], [read_json(stage / "pairs.json") for stage in stages if (stage / "pairs.json").is_file()]
    for pair in {pair["teacher"]: pair for pairs in found for pair in pairs}.values():
        segments = _segments(axis, f"feature/{pair['teacher']}")
        chart = _chart({"feature": segments}, max((x for s in segments for x, _ in s), default=0), [], smooth=True)
        if chart:
            first = next(s[0][1] for s in segments if s)
            rows.append({**pair, "chart": chart, "first": first, "last": chart["lines"][0]["last"]})
    return rows


def _chart(
    lines: Mapping[str, list[list[Point]]], right: float, tips: list[tuple[float, str]], *, smooth: bool = False
) -> dict[str, Any] | None:
    """Lines over 0 to `right`, y logarithmic, in a square of 1000 that the page stretches; `raw`: not smoothed."""
    lines = {name: kept for name, segments in lines.items() if (kept := [s for s in segments if s])}
    values = [y for segments in lines.values() for segment in segments for _, y in segment]
    if not values or not right:
        return None
    low, high = min(values) / 1.08, max(values) * 1.08

    def height(y: float) -> float:
        return math.log(high / y) / math.log(high / low)

    def place(points: list[Point]) -> list[str]:
        return [f"{1000 * x / right:.1f},{1000 * height(y):.1f}" for x, y in _thin(points, MOST_POINTS)]

    drawn = []
    for name, segments in lines.items():
        ways = [_smooth(segment) if smooth else segment for segment in segments]
        raw = list(map(place, segments)) if smooth else []
        drawn.append({"name": name, "raw": raw, "points": list(map(place, ways)), "last": ways[-1][-1][1]})
    width = 1000 / max(1, len(tips))
    bands = [(f"{1000 * x / right - width / 2:.1f}", f"{width:.1f}", text) for x, text in tips]
    return {"lines": drawn, "y_ticks": [(100 * height(y), f"{y:.3g}") for y in _log_ticks(low, high)], "tips": bands}


def _smooth(points: list[Point]) -> list[Point]:
    """A moving geometric mean, centred; it begins at the first value itself, so that a steep start stays steep."""
    sums = [0.0, *accumulate(math.log(y) for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(i, len(points) // 30)
        first, end = i - reach, min(len(points), i + reach + 1)
        out.append((x, math.exp((sums[end] - sums[first]) / (end - first))))
    return out


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**k for k in powers for m in digits if low <= m * 10.0**k <= high]
        if len(ticks) >= 3:
            return _thin(ticks, 7)
    return [low * (high / low) ** share for share in (0.1, 0.5, 0.9)]
