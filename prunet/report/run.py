"""The report of a run: one page that needs no other file, made only from the run folder."""

from pathlib import Path
from typing import Any

import yaml

from prunet import __version__
from prunet.disk.files import write_text
from prunet.disk.steps import read_steps
from prunet.evaluation.measures import Measures, read_measures
from prunet.evaluation.results import EvaluationResult, read_evaluation
from prunet.plan.result import PlanResult
from prunet.report.charts import inline, render, thin
from prunet.report.curves import level_chart, loss_chart, pair_rows, read_logs
from prunet.teacher.teacher import Teacher
from prunet.words import short, without_home

COLUMNS = {"teacher": "teacher", "before": "student before", "after": "student after"}  # before, after distillation
PICTURE_SIDE, SHEET_SIDE, MOST_SHEETS = 384, 1200, 6  # longest sides in pixels; sheets per stage


def write_report(folder: Path | str) -> Path:
    """Writes `report.html` into a run folder from its files; the page needs no other file and no network.

    Raises:
        UserError: the plan or the evaluation is missing (the run has not reached it) or not readable.
    """
    folder = Path(folder)
    plan, steps = PlanResult.load(folder / "plan.json"), read_steps(folder)
    evaluation = read_evaluation(folder / "evaluation", steps)
    recipe_text = without_home((folder / "recipe.yaml").read_text(encoding="utf-8"))
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
        changed=_changed(folder / "evaluation", evaluation),
        net=plan.diagram(),
        losses=loss_chart(axis),
        pairs=pair_rows(axis, stages),
        sheets=[_sheets(stage / "sheets") for stage in stages],
        levels=level_chart(
            {name: evaluation.distance[name].denoiser_by_level for name in ("before", "after")},
            evaluation.protocol.levels,
        ),
        measured=_measured(folder),
        times={name: step.seconds for name, step in steps.items()},
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _measured(folder: Path) -> list[Measures]:
    """Returns the results of `prunet measure` for the run's present student, one for each protocol."""
    paths = sorted((folder / "measured").glob("*/measures.json"))
    if not paths or not (folder / "pipeline" / "model_index.json").is_file():
        return []
    now = Teacher(folder / "pipeline").fingerprint()
    found = [read_measures(path.parent) for path in paths]
    return [result for result in found if result.model.fingerprint == now]


# -- pictures


def _pictures(folder: Path, evaluation: EvaluationResult) -> list[dict[str, Any]]:
    """Returns each prompt with the pictures of teacher and student (before, after) and their distances."""
    return [
        {
            "prompt": prompt,
            "cells": {name: inline(folder / name / f"{i:04d}.png", PICTURE_SIDE) for name in COLUMNS},
            "errors": {name: distance.picture_by_prompt[i] for name, distance in evaluation.distance.items()},
            "error": evaluation.distance["after"].picture_by_prompt[i],
        }
        for i, prompt in enumerate(evaluation.protocol.prompts)
    ]


def _changed(folder: Path, evaluation: EvaluationResult) -> list[dict[str, Any]]:
    """Returns the results of image to image: each start with the pictures of teacher and student and their errors."""
    found = evaluation.image_to_image
    if found is None:
        return []
    before = evaluation.protocol.prompts
    return [
        {
            "prompt": f"{prompt} \N{LEFTWARDS ARROW} {before[i]}",
            "cells": {"start": inline(folder / "pictures" / "teacher" / f"{i:04d}.png", PICTURE_SIDE)}
            | {name: inline(folder / "image-to-image" / name / f"{i:04d}.png", PICTURE_SIDE) for name in COLUMNS},
            "errors": {name: distance.by_picture[i] for name, distance in found.distance.items()},
            "error": found.distance["after"].by_picture[i],
        }
        for i, prompt in enumerate(found.prompts)
    ]


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Returns some of the sheets drawn during training, the first and the last among them."""
    drawn = [p for p in folder.glob("step-*.png") if p.is_file() and p.stem.removeprefix("step-").isdigit()]
    chosen = thin(sorted(drawn), MOST_SHEETS)
    return [{"step": int(p.stem.removeprefix("step-")), **(inline(p, SHEET_SIDE) or {})} for p in chosen]
