"""The steps of a run: their names, what each leaves, and which are done (`steps.json`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet.disk.files import read_json, read_label, write_json, write_text
from prunet.disk.seals import file_checksum
from prunet.errors import UserError
from prunet.recipe.recipe import recipe_yaml
from prunet.student.folder import is_whole
from prunet.training.log import read_log

if TYPE_CHECKING:
    from prunet.runs.run import Run

#: In order; `distil` is one step for each stage.
STEPS = ("plan", "build", "cache", "distil", "evaluate", "export", "report")
STEPS_FIX = "delete it and run again; stages resume from their checkpoints"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def step_names(stages: int, until: str) -> list[str]:
    names = [f"stage-{number}" for number in range(1, stages + 1)]
    return [n for step in STEPS[: STEPS.index(until) + 1] for n in (names if step == "distil" else [step])]


def result_of(this: "Run", step: str) -> Path:
    """The file that is there when the step is done."""
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


def read_done(folder: Path) -> dict[str, Any]:
    """Step -> its `inputs` and `seconds`, and of a stage the checksum of its `log`, as the run folder says.

    Raises:
        UserError: damaged.
    """
    path = folder / "steps.json"
    done = read_json(path, STEPS_FIX) if path.is_file() else {}
    if not (isinstance(done, dict) and all(isinstance(step, dict) for step in done.values())):
        raise UserError(f"{path}: damaged: {STEPS_FIX}")
    return done


def is_done(this: "Run", step: str) -> bool:
    """Whether `step` was finished from these inputs and its result is still there."""
    done = read_done(this.folder).get(step)
    if done is None:  # before the inputs, which are hashes of large files
        return False
    if done.get("inputs") != this.inputs[step]:
        return False
    if step == "cache":
        return all((folder / "cache.json").is_file() for folder, _ in this.cache_specs)
    if step == "plan":  # derived in no time, so another one's is noticed and written again
        path = this.result_of(step)
        found = read_label(path, ("plan", "removed")) if path.is_file() else {}
        return found.get("removed") == sorted(this.derived.removed)
    if step == "export" and this.recipe.export.single_file and not is_whole(this.folder / "student.safetensors"):
        return False
    return is_whole(this.result_of(step))


def begin(this: "Run", step: str) -> None:
    """A step that begins again is not done, nor is what comes after it, however far it gets this time."""
    names, done = this.step_names(), read_done(this.folder)
    kept = {n: value for n, value in done.items() if n in names[: names.index(step)]}
    if kept != done:
        write_json(this.folder / "steps.json", kept)
    write_text(this.folder / "recipe.yaml", recipe_yaml(this.recipe))  # settings may have changed since the plan


def finish(this: "Run", step: str, seconds: float) -> None:
    """Writes down that the step is done from its inputs."""
    log = this.folder / step / "log.jsonl"
    logged = {"log": file_checksum(log)} if log.is_file() else {}
    done = {**read_done(this.folder), step: {"inputs": this.inputs[step], "seconds": seconds} | logged}
    write_json(this.folder / "steps.json", done)


def logged_seconds(this: "Run", step: str) -> float:
    """What all steps of a stage took, those before it was stopped included."""
    log = this.folder / step / "log.jsonl"
    if not log.is_file():
        return 0.0
    batch_size = this.recipe.stages[int(step.removeprefix("stage-")) - 1].batch_size
    rows = read_log(log)
    before = [0, *(row["step"] for row in rows)]
    return sum(
        (row["step"] - b) * batch_size / max(row["images_per_s"], 1e-4)  # as many digits as the log has
        for row, b in zip(rows, before, strict=False)
    )
