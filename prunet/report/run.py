"""The report of a run: one page that holds all it shows, made from the run folder alone."""

import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from prunet import __version__
from prunet.denoisers.unet2d import form as unet
from prunet.disk.files import read_json, read_label, write_text
from prunet.disk.seals import file_checksum
from prunet.errors import UserError
from prunet.evaluation.protocol import describe, title_rows
from prunet.report.charts import Point, draw_chart, inline, many, number, render, short, thin
from prunet.teacher.teacher import Teacher
from prunet.training.loop import read_log

Row = Mapping[str, Any]
Axis = list[list[tuple[float, Row]]]  # by stage: rows of its log, each with its place among the steps of all
COLUMNS = {"teacher": "teacher", "before": "student before", "after": "student after"}  # distillation
SERIES = {"loss": "total", "task": "task", "output": "output", "feature": "feature"}
PICTURE_SIDE, SHEET_SIDE, MOST_SHEETS = 384, 1200, 6  # longest sides in pixels; sheets of a stage
MOST_TIPS = 80  # of a chart


def write_report(folder: Path | str) -> Path:
    """Writes `report.html` into a run folder from what lies there; the page needs no other file and no network.

    Raises:
        UserError: the run is not that far: no plan or no evaluation there, or not readable.
    """
    folder = Path(folder)
    plan = read_json(folder / "plan.json")
    steps = read_json(path) if (path := folder / "steps.json").is_file() else {}
    evaluation = read_evaluation(folder / "evaluation", steps)
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_text)
    stages = [folder / f"stage-{number}" for number in range(1, len(recipe["stages"]) + 1)]
    axis = read_logs(stages, steps)
    page = render(
        "report.html.j2",
        version=__version__,
        teacher=short(recipe["teacher"]["source"]),
        recipe=recipe,
        recipe_text=recipe_text,
        plan=plan,
        evaluation=evaluation,
        columns=COLUMNS,
        pictures=_pictures(folder / "evaluation" / "pictures", evaluation),
        net=draw_unet(plan),
        losses=_loss_chart(axis),
        pairs=_pair_rows(axis, stages),
        sheets=[_sheets(stage / "sheets") for stage in stages],
        levels=level_chart(
            {name: evaluation["distance"][name]["denoiser_by_level"] for name in ("before", "after")},
            evaluation["protocol"]["levels"],
        ),
        measured=_measured(folder),
        describe=describe,
        times={name: step["seconds"] for name, step in steps.items()},
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def read_evaluation(folder: Path, steps: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `evaluate` left in a folder, which of a run is `evaluation`. `steps`: what `steps.json` of the run holds.

    Raises:
        UserError: not there, not readable, not as it was written, of another student, or older than the intervals.
    """
    again = f"delete {folder} and run it again"
    evaluation = read_label(folder / "evaluation.json", ("distance", "protocol", "sizes"), again)
    if not all("intervals" in distance for distance in evaluation["distance"].values()):
        raise UserError(f"{folder.parent}: evaluated by an older prunet: {again}")
    for name, expected in evaluation.get("pictures", {}).items():
        if (path := folder / name).is_file() and file_checksum(path) != expected:
            raise UserError(f"{path}: damaged or changed (its checksum is another than when it was drawn): {again}")
    student = evaluation["protocol"].get("student")
    last = max((name for name in steps or {} if name.startswith("stage-")), key=lambda n: int(n[6:]), default=None)
    if steps and last and student not in (None, steps[last].get("inputs")):
        raise UserError(f"{folder / 'evaluation.json'}: of another student than {folder.parent / last}: {again}")
    return evaluation


def _measured(folder: Path) -> list[dict[str, Any]]:
    """What `prunet measure` found by each protocol of the student that is there now."""
    paths = sorted((folder / "measured").glob("*/measures.json"))
    if not paths or not (folder / "pipeline" / "model_index.json").is_file():
        return []
    now = Teacher(folder / "pipeline").fingerprint()
    found = [read_json(path) for path in paths]
    return [result | {"rows": title_rows(result)} for result in found if result["model"]["fingerprint"] == now]


# -- pictures


def _pictures(folder: Path, evaluation: Row) -> list[dict[str, Any]]:
    """Each prompt with what teacher and student (before, after) drew of it, and how far they are apart."""
    return [
        {
            "prompt": prompt,
            "cells": {name: inline(folder / name / f"{i:04d}.png", PICTURE_SIDE) for name in COLUMNS},
            "errors": {name: d["picture_by_prompt"][i] for name, d in evaluation["distance"].items()},
            "error": evaluation["distance"]["after"]["picture_by_prompt"][i],
        }
        for i, prompt in enumerate(evaluation["protocol"]["prompts"])
    ]


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Some of the sheets drawn while training, the first and the last among them."""
    chosen = thin(sorted(folder.glob("step-*.png")), MOST_SHEETS)
    return [{"step": int(p.stem.removeprefix("step-")), **(inline(p, SHEET_SIDE) or {})} for p in chosen]


# -- the U-Net


def draw_unet(plan: Row) -> dict[str, Any]:
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
    title = f"{name}: {many(sum(p.numel() for p in module.parameters()))} parameters, "
    title += "removed" if is_gone else "kept" if all(blocks) else f"{sum(blocks)} of {depth} transformer blocks kept"
    return {"kind": kind, "name": name, "gone": is_gone, "blocks": blocks, "title": title}


# -- charts


def read_logs(stages: list[Path], steps: Mapping[str, Any]) -> Axis:
    """The logs of all stages on one axis: a stage begins where the last one ended.

    Raises:
        UserError: a log is not the one with which the stage ended, by `steps`, or a row of it is damaged.
    """
    for stage in stages:
        log, expected = stage / "log.jsonl", steps.get(stage.name, {}).get("log")
        if expected and log.is_file() and file_checksum(log) != expected:
            raise UserError(
                f"{log}: damaged or changed (its checksum is another than when the stage ended): delete it (the charts "
                f"then lack its rows), or {stage} to train it again"
            )
    logs = [read_log(log) if (log := stage / "log.jsonl").is_file() else [] for stage in stages]
    for stage, rows in zip(stages, logs, strict=True):
        if any(SERIES.keys() - row.keys() for row in rows):
            raise UserError(f"{stage / 'log.jsonl'}: rows without losses: delete {stage} to train it again")
    starts = accumulate((log[-1]["step"] if log else 0 for log in logs), initial=0)
    return [[(start + row["step"], row) for row in log] for start, log in zip(starts, logs, strict=False)]


def segments(axis: Axis, key: str) -> list[list[Point]]:
    """One line a stage, without what a logarithmic scale has no place for (0: a loss that is not used)."""
    return [[(x, row[key]) for x, row in stage if 0 < row.get(key, 0) < math.inf] for stage in axis]


def _loss_chart(axis: Axis) -> dict[str, Any] | None:
    """The losses over the steps of all stages."""
    rows = [row for stage in axis for row in stage]
    tips = [
        (x, f"step {x:,}: " + ", ".join(f"{label} {number(row[key])}" for key, label in SERIES.items()))
        for x, row in thin(rows, MOST_TIPS)
    ]
    right = rows[-1][0] if rows else 0
    chart = draw_chart({label: segments(axis, key) for key, label in SERIES.items()}, right, tips, smooth=True)
    starts = [0, *(stage[-1][0] if stage else 0 for stage in axis[:-1])]
    stages = [(100 * x / right, f"stage {i}") for i, x in enumerate(starts, 1) if chart and len(axis) > 1]
    return chart and chart | {"x_ticks": step_ticks(right), "stages": stages}


def step_ticks(right: float) -> list[tuple[float, str]]:
    """About five round numbers of steps, with their places in percent."""
    size = 10 ** math.floor(math.log10(right / 5))
    every = max(1, next(m * size for m in (1, 2, 5, 10) if m * size >= right / 5))
    return [(100 * x * every / right, f"{x * every:,.0f}") for x in range(int(right / every) + 1)]


def level_chart(by_level: Mapping[str, list[float]], levels: list[float]) -> dict[str, Any] | None:
    """The denoiser's distance over the noise schedule, a line each."""
    lines = {name: [[(100 * x, y) for x, y in zip(levels, ys, strict=False) if y > 0]] for name, ys in by_level.items()}
    tips = [
        (100 * x, f"noise level {x:.0%}: " + ", ".join(f"{name} {number(ys[i])}" for name, ys in by_level.items()))
        for i, x in enumerate(levels)
    ]
    chart = draw_chart(lines, 100, tips)
    return chart and chart | {"x_ticks": [(x, f"{x} %") for x in range(0, 101, 20)], "stages": []}


def _pair_rows(axis: Axis, stages: list[Path]) -> list[dict[str, Any]]:
    """The feature loss of each pair of any stage: first and last value, and its way between them."""
    rows, found = [], [read_json(stage / "pairs.json") for stage in stages if (stage / "pairs.json").is_file()]
    found = [pairs["pairs"] if isinstance(pairs, dict) else pairs for pairs in found]  # a list, before checksums
    for pair in {pair["teacher"]: pair for pairs in found for pair in pairs}.values():
        ways = segments(axis, f"feature/{pair['teacher']}")
        chart = draw_chart({"feature": ways}, max((x for s in ways for x, _ in s), default=0), [], smooth=True)
        if chart:
            first = next(s[0][1] for s in ways if s)
            rows.append({**pair, "chart": chart, "first": first, "last": chart["lines"][0]["last"]})
    return rows
