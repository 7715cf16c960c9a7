"""The report of a run: one page that needs no other file, made only from the run folder."""

from pathlib import Path
from typing import Any

import yaml

from prunet import __version__
from prunet.disk.files import write_text
from prunet.disk.seals import file_checksum
from prunet.disk.steps import read_steps, write_steps
from prunet.evaluation.measures import Measures, read_measures
from prunet.evaluation.results import read_evaluation
from prunet.plan.result import PlanResult
from prunet.report.charts import inline, render, thin
from prunet.report.curves import level_chart, loss_chart, pair_rows, read_logs
from prunet.report.pictures import Column, changed, drawn
from prunet.report.runtimes import better_trades, exported
from prunet.teacher.teacher import Teacher
from prunet.words import short, without_home

COLUMNS = {"teacher": "teacher", "before": "student before", "after": "student after"}  # before, after distillation
SHEET_SIDE, MOST_SHEETS = 1200, 6  # longest side in pixels; sheets per stage


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
    now = _fingerprint(folder)
    exports = exported(folder, now)
    shown = {name: Column(folder / "evaluation", evaluation, name) for name in COLUMNS}
    page = render(
        "report.html.j2",
        version=__version__,
        teacher=short(recipe["teacher"]["source"]),
        recipe=recipe,
        recipe_text=recipe_text,
        plan=plan,
        evaluation=evaluation,
        columns=COLUMNS,
        pictures=drawn(shown),
        changed=changed(shown),
        net=plan.diagram(),
        losses=loss_chart(axis),
        pairs=pair_rows(axis, stages),
        sheets=[_sheets(stage / "sheets") for stage in stages],
        levels=level_chart(
            {name: evaluation.distance[name].denoiser_by_level for name in ("before", "after")},
            evaluation.protocol.levels,
        ),
        measured=[result for result in _measures(folder) if result.model.fingerprint == now],
        exports=exports,
        trades=better_trades(exports),
        times={name: step.seconds for name, step in steps.items()},
    )
    path = folder / "report.html"
    write_text(path, page)
    if (done := steps.get("report")) and done.page:  # else the run would take its new page for a damaged one
        write_steps(folder, steps | {"report": done.model_copy(update={"page": file_checksum(path)})})
    return path


def _fingerprint(folder: Path) -> str | None:
    """Returns the fingerprint of the run's pipeline; None if there is no pipeline, or nothing to compare it with."""
    pipeline = folder / "pipeline"
    made_of_it = [*folder.glob("measured/*/measures.json"), *folder.glob("*/openvino.json")]
    if not made_of_it or not (pipeline / "model_index.json").is_file():
        return None  # without reading the weights
    return Teacher(pipeline, only_draw=True).fingerprint()


def _measures(folder: Path) -> list[Measures]:
    """Returns the results of `prunet measure` in the run folder, one for each protocol."""
    return [read_measures(path.parent) for path in sorted((folder / "measured").glob("*/measures.json"))]


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Returns some of the sheets drawn during training, the first and the last among them."""
    drawn = [p for p in folder.glob("step-*.png") if p.is_file() and p.stem.removeprefix("step-").isdigit()]
    chosen = thin(sorted(drawn), MOST_SHEETS)
    return [{"step": int(p.stem.removeprefix("step-")), **(inline(p, SHEET_SIDE) or {})} for p in chosen]
