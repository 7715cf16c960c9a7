"""One page with several runs side by side, for runs with the same protocol of evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunet import __version__
from prunet.disk.files import write_text
from prunet.disk.reading import check_permission
from prunet.disk.steps import read_steps
from prunet.errors import UserError
from prunet.evaluation.protocol import differences
from prunet.evaluation.results import Distance, EvaluationResult, read_evaluation
from prunet.plan.result import PlanResult
from prunet.report.charts import draw_chart, render
from prunet.report.curves import level_chart, read_logs, segments, step_ticks
from prunet.report.pictures import Column, changed, drawn
from prunet.words import command, names_of, short, without_home

MOST_RUNS = 8  # the colours and columns of a page


@dataclass(frozen=True)
class Compared:
    """A finished run: its name on the page, its folder, and the folder's contents."""

    name: str
    kind: str  # its colour
    folder: Path
    plan: PlanResult
    evaluation: EvaluationResult
    recipe_text: str
    axis: Any  # the logs of its stages

    @property
    def distance(self) -> Distance:
        """The distances of the distilled student."""
        return self.evaluation.distance["after"]

    @property
    def teacher(self) -> str:
        """The teacher's name."""
        return short(yaml.safe_load(self.recipe_text)["teacher"]["source"])


def open_runs(folders: Sequence[Path | str]) -> list[Compared]:
    """Opens the runs in `folders`; their evaluations must have the same protocol.

    Raises:
        UserError: fewer than 2 or more than 8 runs, a run that is not evaluated, or protocols that differ (the message
            names the keys).
    """
    paths = [Path(folder) for folder in folders]
    if not 2 <= len(paths) <= MOST_RUNS:
        raise UserError(f"compare: give 2 to {MOST_RUNS} run folders, not {len(paths)}")
    names = names_of(paths)
    runs = [_open_run(folder, names[i], f"run-{i}") for i, folder in enumerate(paths)]
    first = _protocol(runs[0])
    for run in runs[1:]:
        if apart := differences(first, _protocol(run)):
            fix = "evaluate both in the same way"
            if "noise" in apart:
                fix = "delete the evaluation/ of the one that prunet 0.2 evaluated, and run it again"
            raise UserError(
                f"{run.folder}: evaluated differently from {runs[0].folder}: they differ in {', '.join(apart)}, so "
                f"their numbers cannot be compared: {fix}"
            )
    return runs


def _open_run(folder: Path, name: str, kind: str) -> Compared:
    """Opens a run, and checks that its evaluation is of its present student.

    Raises:
        UserError: the evaluation is missing or of another student, or a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give folders that `prunet run` or `prunet measure` wrote")
    try:
        steps = read_steps(folder)
        if "evaluate" not in steps:
            raise UserError(f"{folder}: not evaluated after its training: finish it with {command('run', folder)}")
        plan, evaluation = PlanResult.load(folder / "plan.json"), read_evaluation(folder / "evaluation", steps)
        check_permission(folder / "recipe.yaml")
        recipe_text = without_home((folder / "recipe.yaml").read_text(encoding="utf-8"))
        stages = yaml.safe_load(recipe_text)["stages"]
        axis = read_logs([folder / f"stage-{number}" for number in range(1, len(stages) + 1)], steps)
        run = Compared(name, kind, folder, plan, evaluation, recipe_text, axis)
        _ = (plan.diagram(), run.teacher, run.distance)
        return run
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: damaged ({error!r}): delete the damaged file and run the recipe again") from error


def _protocol(run: Compared) -> dict[str, Any]:
    return run.evaluation.protocol.model_dump(exclude={"student"})


def write_comparison(folders: Sequence[Path | str], path: Path | str) -> Path:
    """Writes one page about all runs to `path`; the page needs no other file and no network."""
    runs, path = open_runs(folders), Path(path)
    protocol = runs[0].evaluation.protocol
    shown = {run.kind: Column(run.folder / "evaluation", run.evaluation, "after") for run in runs}
    shown |= {"teacher": Column(runs[0].folder / "evaluation", runs[0].evaluation, "teacher")}
    page = render(
        "comparison.html.j2",
        version=__version__,
        teacher=runs[0].teacher,
        runs=runs,
        protocol=protocol,
        columns={"teacher": "teacher"} | {run.kind: run.name for run in runs},
        pictures=drawn(shown),
        changed=changed(shown) if _same(runs, _image_to_image) else [],
        measures=_measures(runs),
        nets=[run.plan.diagram() for run in runs],
        losses=_named(runs, _loss_chart(runs)),
        levels=_named(runs, level_chart({run.kind: run.distance.denoiser_by_level for run in runs}, protocol.levels)),
    )
    write_text(path, page)
    return path


def _measures(runs: list[Compared]) -> dict[str, list[tuple[float, ...]]]:
    """Returns the distances by title: that of each run with its interval."""
    fields = {"denoiser output": "denoiser", "final latents": "latent", "pictures": "picture"}
    if _same(runs, lambda run: run.evaluation.lpips):
        fields |= {"pictures, LPIPS": "lpips"}
    distances = [run.distance for run in runs]
    found: dict[str, list[tuple[float, ...]]] = {}
    for title, field in fields.items():
        found[title] = [(getattr(distance, field), *distance.intervals[field]) for distance in distances]
    if _same(runs, _image_to_image):
        changed = [result.distance["after"] for run in runs if (result := run.evaluation.image_to_image)]
        found["pictures from pictures"] = [(one.picture, *one.interval) for one in changed]
    return found


def _same(runs: list[Compared], made_by: Callable[[Compared], Any]) -> bool:
    """Returns whether every run has a part of the evaluation, made in the same way; if not, the page leaves it out."""
    made = [made_by(run) for run in runs]
    return made[0] is not None and all(one == made[0] for one in made)


def _image_to_image(run: Compared) -> dict[str, Any] | None:
    """Returns what the numbers of image to image depend on beside the protocol."""
    found = run.evaluation.image_to_image
    return found.model_dump(exclude={"distance"}) if found else None


def _loss_chart(runs: list[Compared]) -> dict[str, Any] | None:
    """Plots the output loss of each run by step, the one term that means the same in all runs."""
    ways = {run.kind: segments(run.axis, "output") for run in runs}
    right = max((x for way in ways.values() for segment in way for x, _ in segment), default=0)
    chart = draw_chart(ways, right, [], smooth=True)
    return chart and chart | {"x_ticks": step_ticks(right), "stages": []}


def _named(runs: list[Compared], chart: dict[str, Any] | None) -> dict[str, Any] | None:
    names = {run.kind: run.name for run in runs}
    return chart and chart | {"lines": [{**line, "name": names[line["kind"]]} for line in chart["lines"]]}
