"""The runs in a folder, described from their JSON and YAML files."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunet.disk.files import read_json
from prunet.disk.ownership import worker_of
from prunet.disk.reading import load_mapping
from prunet.disk.steps import read_steps
from prunet.errors import UserError
from prunet.training.log import read_log

#: Depth of folders that are searched: the runs of an ablation lie two levels below its folder.
DEEPEST = 4


@dataclass(frozen=True)
class FoundRun:
    """A run as its files describe it. Values that do not exist yet are None.

    `run`: its path. `worker`: the process that works in it. `parameters`: the student's, and their `share` of the
    teacher's. `before` and `after` distillation: root mean squared error of the student's
    pictures against the teacher's, which all kinds of students have. `bytes`: of all files.
    """

    run: str
    state: str
    worker: str | None
    bytes: int
    teacher: str | None = None
    plan: str | None = None
    parameters: int | None = None
    share: float | None = None
    before: float | None = None
    after: float | None = None


def find_runs(folder: Path) -> list[FoundRun]:
    """Describes each run in a folder and those below it, or the folder itself if it is a run, in order of names.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give a folder that contains runs")
    return [_summary(path) for path in _runs_in(folder, DEEPEST)]


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "recipe.yaml").is_file() and (folder / "plan.json").is_file():
        yield folder
    elif depth:
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and not inside.is_symlink() and not inside.name.startswith("."):
                yield from _runs_in(inside, depth - 1)


def _summary(folder: Path) -> FoundRun:
    found: dict[str, Any] = {}
    try:
        recipe, plan = load_mapping(folder / "recipe.yaml", "a recipe"), read_json(folder / "plan.json")
        done = read_steps(folder)
        student, teacher = (plan["parameters"][name] for name in ("student", "teacher"))
        found |= {"teacher": recipe["teacher"]["source"], "plan": recipe["plan"]["name"]}
        found |= {"parameters": student, "share": student / teacher, "state": _state(folder, recipe, done)}
        if "evaluate" in done:
            distance = read_json(folder / "evaluation" / "evaluation.json")["distance"]
            found |= {name: distance[name]["picture"] for name in ("before", "after")}
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        found["state"] = f"damaged: {error}"
    files = (Path(top) / name for top, _, names in os.walk(folder) for name in names)
    size = sum(file.lstat().st_size for file in files)
    return FoundRun(run=str(folder), worker=worker_of(folder), bytes=size, **found)


def _state(folder: Path, recipe: Mapping[str, Any], done: Mapping[str, Any]) -> str:
    """Returns `done`, or the progress of the run."""
    if "report" in done:
        return "done"
    for number, stage in enumerate(recipe["stages"], 1):
        if (name := f"stage-{number}") not in done:
            log = folder / name / "log.jsonl"
            return f"{name}, step {_last_step(log):,} of {stage['steps']:,}" if log.is_file() else f"before {name}"
    return "evaluated" if "evaluate" in done else "distilled"


def _last_step(log: Path) -> int:
    rows = read_log(log)
    return int(rows[-1]["step"]) if rows else 0
