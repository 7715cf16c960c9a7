"""Checks everything that can be wrong with a run, before anything is loaded or computed."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from prunet.console import say
from prunet.data.cache import read_spec
from prunet.data.encoding import pictures_are_gone
from prunet.data.paths import check_paths
from prunet.data.sources import check_source
from prunet.denoisers.pairs import term_factors
from prunet.disk.files import read_label
from prunet.disk.ownership import check_place, resolve
from prunet.disk.reading import parse_yaml
from prunet.errors import UserError
from prunet.recipe.recipe import Recipe, load_recipe, read_prompts, recipe_yaml
from prunet.runs.disk import check_disk
from prunet.runs.fingerprints import SCHEDULE, spec_settings, stage_label
from prunet.runs.steps import check_replaceable
from prunet.sampling.made_for import made_for
from prunet.sampling.paths import check_jumps
from prunet.sampling.samplers import check_sampler
from prunet.student.student import check_steps
from prunet.teacher.configs import check_condition
from prunet.teacher.copying import check_other_parts
from prunet.teacher.space import check_same_space, check_size
from prunet.training.checkpoints import check_stage
from prunet.training.lora import check_rank
from prunet.words import command, difference

if TYPE_CHECKING:
    from prunet.runs.run import Run

#: Advice for a damaged label of a stage.
LABEL_FIX = "delete it, if the checkpoints beside it are of this recipe, and give the same command again"


def check_run(this: "Run", until: str) -> None:
    """Refuses anything that would stop a step up to and including `until` later, and warns of odd settings.

    Raises:
        UserError: the recipe, its models, data or folders do not fit.
    """
    check_places(this.recipe)
    parse_yaml(recipe_yaml(this.recipe), "The recipe with all its values")  # the run writes this, and reads it again
    _check_models(this)
    _check_data(this)
    todo = this.todo(until)
    if "export" in todo:
        check_other_parts(this.teachers[-1])
        if this.recipe.export.single_file:
            _check_single_file(this)
    check_steps(this.steps_down)
    for number, stage in enumerate(this.recipe.stages, 1):
        this.micro_batch(number)
        term_factors(this.pairs(number), stage.losses.weights)
        if stage.lora:
            check_rank(this.steps_down[number - 1].student_config, stage.lora, f"stages.{number - 1}.lora")
    _check_folder(this)
    for step in todo:  # refuse here, before a finished step begins again
        check_replaceable(this, step)
        if step.startswith("stage-"):
            check_stage(this.folder / step, this.recipe.stages[int(step.removeprefix("stage-")) - 1])
    if todo:  # a finished run may lie on a read-only mount
        check_disk(this, todo)
    _say_what_is_odd(this.recipe)


def _check_single_file(this: "Run") -> None:
    """Refuses a student that has no form as a single file."""
    from prunet.teacher.ldm import check_layout

    last = this.teachers[-1]
    try:
        check_layout(this.derived.student_config, last.part_config("vae"), last.part_config("text_encoder"))
    except UserError as error:
        raise UserError(f"export.single_file: {error}: set it to false") from error


def check_places(recipe: Recipe) -> None:
    """Refuses an output or cache folder that is not prunet's own, or that is, lies in or contains inputs of the run."""
    check_place(Path(recipe.output), "run", "output", read_paths(recipe))
    if recipe.cache:
        _check_apart(Path(recipe.output), Path(recipe.cache))
        check_place(Path(recipe.cache), "cache", "cache", read_paths(recipe))


def _check_apart(output: Path, cache: Path) -> None:
    """Refuses a cache in another subfolder of the run than `cache`, because a run replaces subfolders as a whole."""
    run, place = resolve(output, "output"), resolve(cache, "cache")
    if run in place.parents and not re.fullmatch(r"cache(-\d+)?", str(place.relative_to(run))):
        raise UserError(
            f"cache: {cache} lies in the output {output}: leave it out to use {output / 'cache'}, or give another"
        )
    if place == run or place in run.parents:
        raise UserError(
            f"cache: the output {output} {'is' if place == run else 'lies in'} {cache}: give another folder"
        )


def read_paths(recipe: Recipe) -> list[Path]:
    """Returns the paths of a recipe's teachers and data that lie on this machine; nothing may be written there."""
    teachers = [recipe.teacher, *(stage.teacher for stage in recipe.stages if stage.teacher)]
    data = recipe.data.source or []
    sources = [*(s for t in teachers for s in (t.source, t.config) if s), *([data] if isinstance(data, str) else data)]
    return [path for path in (Path(source).expanduser() for source in sources) if path.exists()]


def _check_models(this: "Run") -> None:
    data, evaluation = this.recipe.data, this.recipe.evaluation
    check_size(this.teacher, this.size)
    for teacher in dict.fromkeys([this.teacher, *this.teachers]):
        _ = teacher.noise_scheduler
        teacher.check_weights()
        check_same_space(this.teacher, teacher)
        encoders = [teacher.part_config(part) for part in teacher.text_encoders]
        check_condition(teacher.unet_config, encoders, teacher.source)
        if data.source is None:
            check_sampler("dpmsolver++", data.steps, teacher.part_config("scheduler"), teacher.source, "data")
    last = this.teachers[-1]
    schedule = last.part_config("scheduler")
    check_sampler(evaluation.sampler, evaluation.steps, schedule, last.source, "evaluation")
    own = made_for(last)
    if own and any(getattr(evaluation, key) != value for key, value in own):
        say(f"[yellow]{escape(last.source)} was made for {own},[/] but evaluation draws in another way")
    for number, stage in enumerate(this.recipe.stages):
        if stage.has("paths") or stage.jumps:
            check_jumps(this.teachers[number], stage, f"stages.{number}")


def _check_data(this: "Run") -> None:
    data = this.recipe.data
    if data.source is None:
        read_prompts(data.prompts or [], data.limit)
    elif not pictures_are_gone(data, this.cache_folder):
        check_source(data.source, image_column=data.image_column, caption_column=data.caption_column)
    read_prompts(this.recipe.evaluation.prompts, this.recipe.evaluation.limit)


def _check_folder(this: "Run") -> None:
    """Refuses a folder with the cache or the checkpoints of another run, before anything in it is replaced."""
    back = _back(this)
    for folder, spec in this.cache_specs:
        _check_apart(this.folder, folder)
        check_place(folder, "cache", "cache", read_paths(this.recipe))
        if (folder / "spec.json").is_file() and (made := read_spec(folder)) != spec:
            what = difference(spec_settings(made), spec_settings(spec))
            raise UserError(
                f"{folder}: holds a cache made with {what}: {back}, delete that folder, or give another with 'cache:'"
            )
    for folder, spec in this.path_specs.values():
        check_place(folder, "cache", "cache", read_paths(this.recipe))
        if (folder / "spec.json").is_file():
            check_paths(folder, spec)
    for number in range(1, len(this.recipe.stages) + 1):
        folder = this.folder / f"stage-{number}"
        label = folder / "inputs.json"
        if not ((folder / "checkpoints").is_dir() and label.is_file()):
            continue
        found, now = read_label(label, ("inputs",), LABEL_FIX), stage_label(this, number)
        then, schedule = found.get("settings", {}), now["settings"][SCHEDULE]
        if found["inputs"] != now["inputs"] or then.get(SCHEDULE, schedule) != schedule:
            what = difference({SCHEDULE: schedule} | then, now["settings"]) if then else None
            what = what or "another teacher, plan, data, seed or settings"
            raise UserError(
                f"{folder}: holds checkpoints trained with {what}: {back}, give another output, or delete that folder"
            )


def _back(this: "Run") -> str:
    """Returns advice for going back to the run folder's old settings: its own recipe, if that differs."""
    own, deciding = this.folder / "recipe.yaml", {"teacher", "plan", "initialisation", "data", "stages", "seed"}
    if not own.is_file():
        return "set it back"
    then, now = (r.model_dump(mode="json", context="full", include=deciding) for r in (load_recipe(own), this.recipe))
    if then == now:
        return "put that back as it was"  # the files changed, not the recipe
    return f"set it back ({command('run', this.folder)} resumes with the run's own recipe)"


def _say_what_is_odd(recipe: Recipe) -> None:
    if not recipe.plan.remove:
        say("[yellow]The plan removes nothing:[/] the student will be as large as the teacher")
    for number, stage in enumerate(recipe.stages, 1):
        if stage.fixed_guidance not in (0, drawn := recipe.evaluation.guidance_scale):
            say(
                f"[yellow]Stage {number} has the teacher at guidance {stage.fixed_guidance:g},[/] but evaluation has "
                f"it at {drawn:g}"
            )
        if stage.warmup_steps >= stage.steps:
            say(
                f"[yellow]Stage {number} never reaches its learning_rate:[/] warmup_steps {stage.warmup_steps} of "
                f"{stage.steps} steps"
            )
