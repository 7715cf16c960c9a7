"""An ablation: one recipe with some of its values changed, several seeds each, in one table with intervals."""

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, Strict, ValidationError
from rich.markup import escape

from prunet.console import console, progress, say
from prunet.disk.files import write_text
from prunet.disk.ownership import check_place, hold
from prunet.disk.reading import load_mapping
from prunet.errors import UserError
from prunet.evaluation.results import EvaluationResult
from prunet.intervals import summary
from prunet.recipe.paths import PathOrId, PathText, from_folder
from prunet.recipe.recipe import Recipe, explain, load_recipe
from prunet.recipe.values import Part, Seed
from prunet.runs.ablation_table import MEASURES, AblationResult, Arm, markdown, shared_protocol
from prunet.runs.checks import read_paths
from prunet.runs.run import Run
from prunet.runs.steps import copy_stage
from prunet.runtime import Runtime
from prunet.teacher.teacher import PARTS

#: Most runs (arms times seeds), because each recipe is read and checked before the first run starts.
MOST_RUNS = 500
#: Keys of a recipe that the ablation sets for each run.
OWN = {"seed", "output", "cache"}


class Ablation(Part):
    """The settings of an ablation. `arms`: for each name, the values of the recipe that differ."""

    title: str = Field(default="Ablation", description="title of the table")
    recipe: PathOrId = Field(description="the recipe that all arms share: a file, or a shipped recipe's name")
    set: dict[str, Any] = Field(default={}, description="values for all arms, in place of those in the recipe")
    seeds: Annotated[list[Annotated[Seed, Strict()]], Field(min_length=1)] = Field(
        default=[1, 2, 3], description="seeds; each arm is trained once with each"
    )
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="maps the name of an arm to its values by key (`stages.0.losses.feature: 0`)"
    )
    output: Annotated[PathText, Field(min_length=1)] = Field(description="folder for all runs and the table")


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Ablation, dict[tuple[str, int], Recipe]]:
    """Loads the ablation in a YAML file, and the recipe of each (arm, seed), and checks them all.

    `overrides` (`key=value`) change the recipe of every arm.

    Raises:
        UserError: the file is not readable, or a recipe does not fit (the message names its arm).
    """
    path = Path(path)
    try:
        ablation = Ablation.model_validate(from_folder(load_mapping(path, "an ablation"), str(path.parent)))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Ablation)}") from error
    if (runs := len(ablation.arms) * len(ablation.seeds)) > MOST_RUNS:
        raise UserError(f"{path}: {runs:,} runs, arms times seeds, are more than {MOST_RUNS}: make several of it")
    if len(set(ablation.seeds)) < len(ablation.seeds):
        raise UserError(f"{path}: a seed is given twice: {', '.join(map(str, ablation.seeds))}")
    given = {*ablation.set, *(key for arm in ablation.arms.values() for key in arm)}
    given |= {override.partition("=")[0] for override in overrides}
    if own := OWN & {key.strip() for key in given}:
        raise UserError(f"{path}: {sorted(own)[0]!r} is set for each run by the ablation itself: leave it out")
    folders = [folder_name(arm) for arm in ablation.arms]
    if len(set(folders)) < len(folders) or "" in folders:
        raise UserError(f"{path}: two arms would share one folder, or one has no name: {', '.join(ablation.arms)}")
    recipes = {}
    for arm, values in ablation.arms.items():
        for seed in ablation.seeds:
            output = Path(ablation.output) / folder_name(arm) / f"seed-{seed}"
            fixed = {"seed": seed, "output": str(output), "cache": str(output / "cache")}
            try:
                recipe = load_recipe(ablation.recipe, overrides, values={**ablation.set, **values, **fixed})
            except UserError as error:
                raise UserError(f"{path}: arm {arm!r}: {error}") from error
            recipes[arm, seed] = recipe
            same, ours = (_measured(r) for r in (next(iter(recipes.values())), recipe))
            if apart := [part for part in ours if ours[part] != same[part]]:
                first = next(iter(ablation.arms))
                raise UserError(
                    f"{path}: arms {first!r} and {arm!r} differ in {apart[0]}, so that no table can hold both"
                )
    seen: dict[str, str] = {}
    for arm in ablation.arms:
        asked = recipes[arm, ablation.seeds[0]].model_dump_json(exclude={"output", "cache"})
        if (same_as := seen.setdefault(asked, arm)) != arm:
            raise UserError(f"{path}: arms {same_as!r} and {arm!r} are the same recipe: leave one out")
    return ablation, _share_caches(recipes, Path(ablation.output) / "caches")


def _measured(recipe: Recipe) -> dict[str, Any]:
    """Returns what the evaluation of a student depends on: the teacher, the size of pictures, how they are drawn."""
    last = recipe.stages[-1].teacher or recipe.teacher
    return {"teacher": last, "evaluation": recipe.evaluation, "data.size": recipe.data.size}


def folder_name(arm: str) -> str:
    """Returns the name of an arm's folder: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")


def _share_caches(recipes: Mapping[tuple[str, int], Recipe], folder: Path) -> dict[tuple[str, int], Recipe]:
    """Gives recipes with the same teachers, data and seed one cache in `folder`, unless they learn from other paths.

    Paths lie beside their cache (`stage_paths`), so recipes without any use the cache of those that have some.
    """
    needs = {key: (_cache_name(recipe, []), _paths_of(recipe)) for key, recipe in recipes.items()}
    shared = {}
    for key, recipe in recipes.items():
        latents, paths = needs[key]
        alike = (theirs for same, theirs in needs.values() if same == latents and theirs[: len(paths)] == paths)
        shared[key] = recipe.model_copy(update={"cache": str(folder / _cache_name(recipe, max(alike, key=len)))})
    return shared


def _cache_name(recipe: Recipe, paths: list[dict[str, Any]]) -> str:
    teachers = [stage.teacher.model_dump() for stage in recipe.stages if stage.teacher]
    return recipe.fingerprint("teacher", "data", "seed", extra=[*teachers, *paths])


def _paths_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the paths that the stages of a recipe learn from, each once, with the stage that names their folder."""
    found: dict[int, dict[str, Any]] = {}
    for number, stage in enumerate(recipe.stages, 1):
        drawn: dict[str, Any] = {"paths": [stage.paths, stage.path_steps, stage.guidance_scale]}
        drawn |= {"teacher": stage.teacher.model_dump()} if stage.teacher else {}
        if stage.has("paths") and drawn not in found.values():
            found[number if found else 0] = drawn  # the first folder has no number
    return [drawn | ({"stage": number} if number else {}) for number, drawn in found.items()]


def ablate(
    ablation: Ablation,
    recipes: Mapping[tuple[str, int], Recipe],
    runtime: Runtime | None = None,
    *,
    workers: int = 1,
) -> AblationResult:
    """Runs every recipe up to its evaluation, `workers` at a time, and writes `ablation.json` and `ablation.md`.

    Finished runs are skipped, so the same call resumes after a stop. A stage that several arms begin with is
    trained once. With several GPUs the workers take them in turn; on a CPU they share its cores.

    Raises:
        UserError: a recipe does not fit, before the first run begins.
    """
    output = Path(ablation.output)
    check_place(output, "ablation", "output", {path for recipe in recipes.values() for path in read_paths(recipe)})
    runtime = runtime or Runtime()
    runs: dict[tuple[str, int], Run] = {}
    for key, recipe in recipes.items():
        try:
            runs[key] = Run(recipe, runtime, like=next(iter(runs.values()), None))
            runs[key].check("evaluate")
        except UserError as error:
            raise UserError(f"arm {key[0]!r}: {error}") from error
    shared_protocol(_finished(runs), more=not all(run.is_done("evaluate") for run in runs.values()))
    with hold(output, "ablation"):
        for run in runs.values():  # caches first, because several arms share one; copied stages follow the build
            for step in run.todo("evaluate"):
                if step in run.step_names("build"):
                    run.do(step)
            for teacher in {run.teacher, *run.teachers}:
                teacher.release(*PARTS)
        todo = [key for key, run in runs.items() if not run.is_done("evaluate")]
        say(f"{len(runs)} runs: {len(ablation.arms)} arms, {len(ablation.seeds)} seeds; {len(todo)} to do")
        with progress("Ablation", len(runs)) as bar:
            bar.advance(len(runs) - len(todo))
            for arm, seed in _each_done(runs, todo, workers):
                bar.advance(1, note=f"{arm}, seed {seed}")
                collect(ablation, runs)
        return collect(ablation, runs)


def _each_done(
    runs: Mapping[tuple[str, int], Run], todo: Sequence[tuple[str, int]], workers: int
) -> Iterator[tuple[str, int]]:
    recipes = [run.recipe for run in runs.values()]
    if workers == 1:
        for key in todo:
            finish(runs[key].recipe, runs[key].runtime, recipes, like=runs[key])
            yield key
        return
    context, others = get_context("spawn"), active_children()
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0), workers)) as pool:
        work = {pool.submit(_do_in_worker, runs[key].recipe, runs[key].runtime, recipes): key for key in todo}
        try:
            for done in as_completed(work):
                done.result()
                yield work[done]
        except BrokenProcessPool as error:
            raise UserError(
                "A worker was killed (perhaps out of memory): lower --workers; the same command resumes from here"
            ) from error
        except BaseException:  # otherwise the pool would first finish its queue; runs resume from checkpoints
            for worker in set(active_children()).difference(others):
                worker.terminate()
            raise


def finish(
    recipe: Recipe,
    runtime: Runtime,
    recipes: Sequence[Recipe],
    *,
    until: str = "evaluate",
    like: Run | None = None,
) -> Run:
    """Does one run up to `until`. Stages that the run of another recipe has finished are copied."""
    run = Run(recipe, runtime, like=like)
    run.check(until)  # checked again, because the disk may be full by now
    others = [Run(other, runtime, like=run) for other in recipes if other.output != recipe.output]
    with run.at_work():
        for step in run.todo(until):
            if step in run.step_names("build"):  # a step that begins makes those after it begin again
                run.do(step)
        for step in (name for name in run.step_names("distil") if name.startswith("stage-")):
            if run.is_done(step):
                continue
            if (found := copy_stage(run, step, others)) is None:
                break
            say(f"[green]✓[/] {step} [dim]is that of {escape(str(found.folder))}[/]")
    run.finish(until)
    return run


_worker = 0


def _start_worker(counter: Any, workers: int) -> None:
    global _worker
    with counter.get_lock():
        _worker = counter.value
        counter.value += 1
    console.quiet = True
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _end_with_parent() -> None:
    """Ends a worker when its parent is killed: otherwise it would write into the same files as the resumed command."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do_in_worker(recipe: Recipe, runtime: Runtime, recipes: Sequence[Recipe]) -> None:
    if runtime.torch_device.type == "cuda":
        runtime = replace(runtime, device=f"cuda:{_worker % torch.cuda.device_count()}")
    runtime.use_device()
    finish(recipe, runtime, recipes)


# -- the table


def collect(ablation: Ablation, runs: Mapping[tuple[str, int], Run]) -> AblationResult:
    """Collects the finished evaluations, and writes them to `ablation.json` and `ablation.md` in the output folder."""
    done = _finished(runs)
    arms = {}
    for arm in ablation.arms:
        results = {seed: done[folder] for seed in ablation.seeds if (folder := runs[arm, seed].folder) in done}
        measures = {
            f"{which}/{key}": summary(
                [
                    getattr(result.distance[which], key)
                    for result in results.values()
                    if not (result.drawn and (which, key) == ("after", "denoiser"))
                ]
            )
            for which, key in MEASURES
        }
        parameters = next((r.sizes["student"].parameters for r in results.values()), None)
        drawn = next((str(r.drawn) for r in results.values() if r.drawn), None)
        arms[arm] = Arm(seeds=list(results), parameters=parameters, measures=measures, drawn=drawn)
    result = AblationResult(title=ablation.title, arms=arms, protocol=shared_protocol(done))
    result.save(Path(ablation.output) / "ablation.json")
    write_text(Path(ablation.output) / "ablation.md", markdown(result))
    return result


def _finished(runs: Mapping[tuple[str, int], Run]) -> dict[Path, EvaluationResult]:
    """Returns the evaluations of the finished runs, by the folder of the run."""
    done = [run for run in runs.values() if run.is_done("evaluate")]
    return {run.folder: EvaluationResult.load(run.result_of("evaluate")) for run in done}
