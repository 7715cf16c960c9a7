"""The steps of a run: what each writes and reads, which are done (`steps.json`), and which are left."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from prunet.console import say
from prunet.disk.files import aside, clear_errors, write_text
from prunet.disk.ownership import check_file, check_place
from prunet.disk.seals import file_checksum, is_whole, sealed_files, verify
from prunet.disk.steps import Step, read_steps, write_steps
from prunet.errors import UserError
from prunet.evaluation.results import EvaluationResult, read_evaluation
from prunet.exports.single_file import check_single_file, is_exported
from prunet.plan.result import PlanResult
from prunet.recipe.recipe import Recipe, recipe_yaml
from prunet.recipe.stage import TeacherSource
from prunet.report.charts import is_page
from prunet.teacher.teacher import Teacher
from prunet.training.checkpoints import check_stage, checkpoints
from prunet.training.log import read_log
from prunet.words import command

if TYPE_CHECKING:
    from prunet.runs.run import Run

#: The steps in order; `distil` stands for one step per stage.
STEPS = ("plan", "cache", "build", "distil", "evaluate", "export", "report")
#: Steps with results for the user; other steps are done only if one of these reads them.
RESULTS = ("plan", "evaluate", "export", "report")
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Files of a step without a seal; `steps.json` has their checksums.
WATCHED = {"log": "{step}/log.jsonl", "pairs": "{step}/pairs.json", "page": "report.html"}


def step_names(stages: int, until: str) -> list[str]:
    """Returns the steps of a run with `stages` stages, in order, up to and including `until`."""
    names = [f"stage-{number}" for number in range(1, stages + 1)]
    return [n for step in STEPS[: STEPS.index(until) + 1] for n in (names if step == "distil" else [step])]


def result_of(this: "Run", step: str) -> Path:
    """Returns the file that exists when the step is done."""
    if step.startswith("stage-"):
        return this.folder / step / "unet" / WEIGHTS
    return {
        "plan": this.folder / "plan.json",
        "build": this.folder / "student" / WEIGHTS,
        "cache": this.cache_folder / "cache.json",
        "evaluate": this.folder / "evaluation" / "evaluation.json",
        "export": this.folder / "pipeline" / "unet" / WEIGHTS,
        "report": this.folder / "report.html",
    }[step]


def folder_of(this: "Run", step: str) -> Path:
    """Returns the folder of the denoiser that a finished step wrote.

    Raises:
        UserError: the folder was deleted; a finished run no longer needs it, but other commands do.
    """
    folder = this.result_of(step).parent
    if not folder.exists():
        raise UserError(f"{folder}: deleted after the run: {command('distil', this.folder)} makes it again")
    return folder


def is_done(this: "Run", step: str) -> bool:
    """Returns whether `step` was finished from these inputs and its result exists; `verify_done` compares checksums."""
    done = read_steps(this.folder).get(step)
    if done is None or done.inputs != this.inputs[step]:  # in this order, because inputs are hashes of large files
        return False
    if step == "plan":  # deriving is fast, so the file is compared, and rewritten if it differs
        path = this.result_of(step)
        return path.is_file() and PlanResult.load(path).removed == sorted(this.derived.removed)
    return not lost(this, step)


def todo(this: "Run", until: str) -> list[str]:
    """Returns the steps that are left up to and including `until`.

    A step is left if it is not done, and its result is for the user or is read by a step that is left. So results that
    only finished steps read may be deleted.
    """
    names = this.step_names(until)
    wanted, found = {names[-1], *RESULTS}, []
    for step in reversed(names):
        if step in wanted and not this.is_done(step):
            found.append(step)
            wanted |= _read_by(this, step)
    return found[::-1]


def _read_by(this: "Run", step: str) -> set[str]:
    """Returns the steps with results that `step` reads."""
    if step.startswith("stage-"):
        number = int(step.removeprefix("stage-"))
        return {"cache", f"stage-{number - 1}" if number > 1 else "build"}
    last = f"stage-{len(this.recipe.stages)}"
    first = {"cache"} if this.recipe.initialisation == "fitted" else set[str]()
    reads = {"build": first, "evaluate": {"build", last}, "export": {"evaluate", last}, "report": {"plan", "evaluate"}}
    return reads.get(step, set())


# -- results on disk


def _sealed(this: "Run", step: str) -> dict[Path, str]:
    """Returns the folders that the step writes as a whole, and the kind in their seals."""
    if step.startswith("stage-"):
        return {this.folder / step / "unet": "stage"}
    if step == "build":
        return {this.folder / "student": "build"}
    if step == "export":
        configs = {this.folder / "student.config": "configs"} if this.recipe.export.single_file else {}
        return {this.folder / "pipeline": "export", **configs}
    return {}


def lost(this: "Run", step: str) -> list[Path]:
    """Returns the files of a finished step that are missing or cut off."""
    files = [this.result_of(step)]
    if step == "cache":
        files = [folder / "cache.json" for folder, _ in [*this.cache_specs, *this.path_specs.values()]]
    if step == "export" and this.recipe.export.single_file:
        files += [this.folder / "student.safetensors", this.folder / "student.config" / "model_index.json"]
    if step == "evaluate" and files[0].is_file():
        evaluation = EvaluationResult.load(files[0], f"delete {files[0].parent} and run it again")
        files += [files[0].parent / name for name in evaluation.pictures]
    files += [file for folder in _sealed(this, step) for file in sealed_files(folder)]
    return [file for file in files if not is_whole(file)]


def remains(this: "Run", step: str) -> str:
    """Describes the remaining results of a step that no step left reads; empty if it was never done."""
    if step not in read_steps(this.folder) or not (gone := lost(this, step)):
        return ""
    return escape(f" any more: {gone[0]} is {'cut off' if gone[0].exists() else 'gone'}")


def verify_done(this: "Run", step: str) -> None:
    """Compares the result of a finished step with its checksums.

    Raises:
        UserError: a file was changed; the message says what to delete, and whether that costs training.
    """
    fix = "delete it, and the same command makes it again"
    if step.startswith("stage-"):
        fix = "delete it, and it is written again from the last checkpoint"
        if not _ends_in_checkpoint(this, step):
            fix = "its checkpoints are gone: copy it from elsewhere, or delete it to train the stage again"
    made_from = None if step == "export" else this.inputs[step]
    for folder in _sealed(this, step):
        verify(folder, fix, made_from)
    if step == "export" and this.recipe.export.single_file:
        check_single_file(this.folder / "student.safetensors", fix)
    if step == "evaluate":
        read_evaluation(this.folder / "evaluation", read_steps(this.folder))
    done = read_steps(this.folder)[step]
    for key, name in WATCHED.items():
        path = this.folder / name.format(step=step)
        if (expected := getattr(done, key)) is None:
            continue
        if not path.is_file():
            say(f"  [yellow]{escape(str(path))} is gone:[/] the report lacks what it held")
        elif file_checksum(path) != expected:
            raise UserError(f"{path}: damaged or changed after it was written: delete it, and give the command again")


def check_replaceable(this: "Run", step: str) -> None:
    """Refuses a step that would replace a user's files, or files that were changed since prunet wrote them.

    Raises:
        UserError: the message says what is there.
    """
    for folder, what in _sealed(this, step).items():
        check_place(folder, what, step)
    if step == "export" and this.recipe.export.single_file:
        check_file(this.folder / "student.safetensors", "single file", step, is_exported)
    if step == "report":
        check_file(this.result_of(step), "report", step, is_page)


def _ends_in_checkpoint(this: "Run", step: str) -> bool:
    """Returns whether the stage can be finished again from its last checkpoint, without training."""
    stage = this.recipe.stages[int(step.removeprefix("stage-")) - 1]
    try:
        state, _ = check_stage(this.folder / step, stage)
    except UserError:
        return False
    return bool(state.get("step") == stage.steps)


def resumes_from(this: "Run", number: int) -> str:
    """Returns a text that says from which training step a stage that is stopped now will resume."""
    saved = checkpoints(this.folder / f"stage-{number}")
    steps = this.recipe.stages[number - 1].steps
    if not saved:
        return f"stage-{number} begins again at step 0 of {steps}: no checkpoint was written yet (checkpoint_every)"
    return (
        f"stage-{number} resumes from step {int(saved[-1].name.removeprefix('step-'))} of {steps}: its last checkpoint"
    )


# -- recording finished steps


def begin(this: "Run", step: str) -> None:
    """Records that a step begins: it and the steps after it are no longer done, even if it stops early.

    If only files were lost and the same ones will be made again, the other steps stay done.
    """
    names, done = this.step_names(), read_steps(this.folder)
    again = step in done and done[step].inputs == this.inputs[step]
    if again and (gone := lost(this, step)):
        say(f"  [yellow]{escape(str(gone[0]))} is {'cut off' if gone[0].exists() else 'missing'}:[/] it is made again")
    same = step in ("plan", "build", "cache") or (step.startswith("stage-") and _ends_in_checkpoint(this, step))
    if not (again and same):
        kept = {n: value for n, value in done.items() if n in names[: names.index(step)]}
        if kept != done:
            write_steps(this.folder, kept)
    write_text(this.folder / "recipe.yaml", recipe_yaml(_as_seen(this)))  # settings may have changed since the plan


def _as_seen(this: "Run") -> Recipe:
    """Returns the recipe with the commits of its teachers on the hub, because a branch may move on."""

    def seen(source: TeacherSource, teacher: Teacher) -> TeacherSource:
        of_the_hub = teacher.commit and (teacher.file is None or source.config)
        return source.model_copy(update={"revision": teacher.commit}) if of_the_hub else source

    stages = [
        stage.model_copy(update={"teacher": seen(stage.teacher, teacher)}) if stage.teacher else stage
        for stage, teacher in zip(this.recipe.stages, this.teachers, strict=True)
    ]
    return this.recipe.model_copy(update={"teacher": seen(this.recipe.teacher, this.teacher), "stages": stages})


def finish(this: "Run", step: str, seconds: float) -> None:
    """Records that the step is done from its inputs."""
    files = {key: this.folder / name.format(step=step) for key, name in WATCHED.items()}
    files = {key: path for key, path in files.items() if path.is_file() and (key == "page") == (step == "report")}
    sums = {key: file_checksum(path) for key, path in files.items()}
    done = Step(inputs=this.inputs[step], seconds=seconds, **sums)
    write_steps(this.folder, read_steps(this.folder) | {step: done})


def copy_stage(this: "Run", step: str, others: Iterable["Run"]) -> "Run | None":
    """Copies a finished stage of another run that has the same inputs; returns that run, or None.

    Checkpoints are left out, because the stage is finished.

    Raises:
        UserError: the other run's result was changed after it was written.
    """
    folder = this.folder / step
    if folder.exists():
        return None
    other = next((run for run in others if run.inputs.get(step) == this.inputs[step] and run.is_done(step)), None)
    if other is None:
        return None
    verify_done(other, step)
    begin(this, step)
    part = aside(folder)
    try:
        with clear_errors(folder):
            shutil.copytree(other.folder / step, part, ignore=shutil.ignore_patterns("checkpoints"))
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    write_steps(this.folder, read_steps(this.folder) | {step: read_steps(other.folder)[step]})
    return other


def logged_seconds(this: "Run", step: str) -> float:
    """Returns the seconds of all training steps of a stage from its log, including those before a stop."""
    log = this.folder / step / "log.jsonl"
    if not log.is_file():
        return 0.0
    batch_size = this.recipe.stages[int(step.removeprefix("stage-")) - 1].batch_size
    rows = read_log(log)
    before = [0, *(row["step"] for row in rows)]
    seconds = (
        (row["step"] - b) * batch_size / max(row["images_per_s"], 1e-4)  # the log has only four decimal places
        for row, b in zip(rows, before, strict=False)
    )
    return float(sum(seconds))
