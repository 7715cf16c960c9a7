"""Sensitivity: the cost of each unit of a denoiser, and the error of its removal."""

from collections.abc import Sequence
from pathlib import Path

from prunet.console import progress
from prunet.data.cache import Cache
from prunet.errors import UserError
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.recipe.recipe import load_recipe
from prunet.search.budgets import costs_of
from prunet.search.examples import GUIDANCE, Examples, cache_examples, noise_examples, path_examples
from prunet.search.results import Sensitivity, UnitResult
from prunet.search.scores import Scores
from prunet.search.units import Unit
from prunet.speed.clock import device_name
from prunet.teacher.teacher import Teacher


def check_samples(
    teacher: Teacher, prompts: Sequence[str] | None, cache: Path | None, guidance_scale: float = GUIDANCE
) -> None:
    """Refuses prompts or a cache that cannot give examples, before weights are loaded.

    Raises:
        UserError: both are given, the cache is not finished, of another teacher or without text, or the teacher cannot
            draw.
    """
    if prompts and cache:
        raise UserError("--prompts and --cache: give one of them")
    if teacher.architecture.only_form and (prompts or cache or guidance_scale != GUIDANCE):
        raise UserError(
            f"{teacher.source}: prunet cannot draw with a {teacher.architecture.class_name} yet, and scores it on "
            "random inputs: leave --prompts, --cache and --guidance-scale out"
        )
    if cache is not None:
        opened = Cache.open(cache_folder(cache))
        opened.check(teacher)
        if "paths" in opened.spec:
            raise UserError(f"--cache {cache}: holds the teacher's paths, not samples: give the run instead")
        if not opened.has_text:
            raise UserError(f"--cache {cache}: holds no text embeddings (its data.text is live): give another")


def open_examples(
    teacher: Teacher,
    prompts: Sequence[str] | None = None,
    cache: Path | None = None,
    file: Path | None = None,
    guidance_scale: float = GUIDANCE,
) -> Examples:
    """Opens the examples on which students are scored: from a cache, or from prompts that the teacher draws.

    `cache`: a cache folder, or a run. `file`: where drawn examples are kept. `guidance_scale`: of the paths, and of the
    outputs that are compared.
    """
    if teacher.architecture.only_form:
        return noise_examples(teacher)
    if cache is not None:
        return cache_examples(teacher, Cache.open(cache_folder(cache)), guidance_scale)
    return path_examples(teacher, prompts, file, guidance_scale)


def cache_folder(path: Path) -> Path:
    """Returns the folder of the cache at `path`, which may be a run."""
    if not (path / "recipe.yaml").is_file():
        return path
    return Path(load_recipe(path / "recipe.yaml").cache or path / "cache")


def sensitivity(units: Sequence[Unit], scores: Scores, *, timed: bool = True) -> Sensitivity:
    """Scores each unit's removal, and times it if `timed`."""
    teacher = scores.teacher
    whole = derive(teacher.unet_config, Plan("none"))
    errors = []
    with progress("Scoring units", len(units)) as bar:
        for unit in units:
            bar.advance(0, unit.name)
            errors.append(scores.error(unit.derived))
            if timed:
                scores.latency(unit.derived)
            bar.advance()
    costs = costs_of(whole.teacher_size, scores.teacher_latency if timed else None)
    left = [costs_of(u.derived.student_size, scores.latency(u.derived) if timed else None) for u in units]
    return Sensitivity(
        teacher=teacher.source,
        teacher_config=whole.teacher_config,
        costs=costs,
        examples=scores.examples.source,
        device=device_name(teacher.device),
        precision=str(teacher.dtype).removeprefix("torch."),
        units=[
            UnitResult(
                name=unit.name,
                remove=list(unit.parts),
                saves={kind: amount - student[kind] for kind, amount in costs.items()},
                error=error.value,
                low=error.low,
                high=error.high,
            )
            for unit, error, student in zip(units, errors, left, strict=True)
        ],
    )
