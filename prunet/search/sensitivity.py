"""Sensitivity: what each unit of a denoiser costs, and what its removal hurts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunet.console import progress
from prunet.data.cache import Cache
from prunet.errors import UserError
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.recipe.recipe import load_recipe
from prunet.search.budgets import costs_of
from prunet.search.examples import Examples, cache_examples, noise_examples, path_examples
from prunet.search.scores import Scores
from prunet.search.units import Unit
from prunet.speed.clock import device_name
from prunet.teacher.teacher import Teacher


def check_samples(teacher: Teacher, prompts: Sequence[str] | None, cache: Path | None) -> None:
    """Refuses prompts or a cache from which no examples can be made, before weights are loaded.

    Raises:
        UserError: both, no finished cache, one of another teacher or without text, or a teacher that cannot draw.
    """
    if prompts and cache:
        raise UserError("--prompts and --cache: give one of them")
    if teacher.architecture.only_form and (prompts or cache):
        raise UserError(
            f"{teacher.source}: prunet knows the form of a {teacher.architecture.class_name} alone, and tries it on "
            "random inputs: leave --prompts and --cache out"
        )
    if cache is not None:
        opened = Cache.open(cache_folder(cache))
        opened.check(teacher)
        if not opened.has_text:
            raise UserError(f"--cache {cache}: holds no text embeddings (its data.text is live): give another")


def open_examples(
    teacher: Teacher, prompts: Sequence[str] | None = None, cache: Path | None = None, file: Path | None = None
) -> Examples:
    """The examples on which students of `teacher` are scored: of a cache, or of prompts that the teacher draws.

    `cache`: a cache folder, or a run. `file`: where drawn examples are kept.
    """
    if teacher.architecture.only_form:
        return noise_examples(teacher)
    if cache is not None:
        return cache_examples(teacher, Cache.open(cache_folder(cache)))
    return path_examples(teacher, prompts, file)


def cache_folder(path: Path) -> Path:
    """The folder of the cache at `path`, which may be a run."""
    if not (path / "recipe.yaml").is_file():
        return path
    return Path(load_recipe(path / "recipe.yaml").cache or path / "cache")


def sensitivity(units: Sequence[Unit], scores: Scores, *, timed: bool = True) -> dict[str, Any]:
    """Scores each unit's removal, and times it if `timed`; returns plain JSON types, units in the denoiser's order.

    A unit has `name`, `remove`, `saves` (by kind of cost, as `costs` are the teacher's), and its `error` with its 95 %
    interval, `low` to `high`.
    """
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

    def left(unit: Unit) -> dict[str, float]:
        return costs_of(unit.derived.student_size, scores.latency(unit.derived) if timed else None)

    return {
        "teacher": teacher.source,
        "teacher_config": whole.teacher_config,
        "costs": costs,
        "examples": scores.examples.source,
        "device": device_name(teacher.device),
        "precision": str(teacher.dtype).removeprefix("torch."),
        "units": [
            {
                "name": unit.name,
                "remove": list(unit.parts),
                "saves": saved(costs, left(unit)),
                **dict(zip(("error", "low", "high"), asdict(error).values(), strict=True)),
            }
            for unit, error in zip(units, errors, strict=True)
        ],
    }


def saved(teacher: Mapping[str, float], student: Mapping[str, float]) -> dict[str, float]:
    """What a student saves, by kind of cost."""
    return {kind: amount - student[kind] for kind, amount in teacher.items()}
