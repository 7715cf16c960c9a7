"""The pictures of evaluations, in rows of one prompt: those of the report of a run and those of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunet.evaluation.results import EvaluationResult
from prunet.report.charts import inline

PICTURE_SIDE = 384  # longest side in pixels


@dataclass(frozen=True)
class Column:
    """A column of pictures: those of the `net` (teacher, before, after) in the folder of an evaluation."""

    folder: Path
    evaluation: EvaluationResult
    net: str


def drawn(columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Returns each prompt with the pictures of teacher and students and their distances."""
    prompts = columns["teacher"].evaluation.protocol.prompts
    return _rows(prompts, columns, "pictures", lambda it: it.evaluation.distance[it.net].picture_by_prompt)


def changed(columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    """Returns each start of image to image with what teacher and students made of it, if that was measured."""
    evaluation = columns["teacher"].evaluation
    found = evaluation.image_to_image
    if found is None:
        return []
    pairs = zip(found.prompts, evaluation.protocol.prompts, strict=False)
    captions = [f"{prompt} \N{LEFTWARDS ARROW} {start}" for prompt, start in pairs]

    def errors(column: Column) -> Sequence[float]:
        result = column.evaluation.image_to_image
        return result.distance[column.net].by_picture if result else []

    rows = _rows(captions, columns, "image-to-image", errors)
    for i, row in enumerate(rows):
        row["cells"]["start"] = _cell(columns["teacher"], "pictures", i)
    return rows


def _cell(column: Column, part: str, number: int) -> dict[str, Any] | None:
    return inline(column.folder / part / column.net / f"{number:04d}.png", PICTURE_SIDE)


def _rows(
    captions: Sequence[str], columns: Mapping[str, Column], part: str, errors_of: Callable[[Column], Sequence[float]]
) -> list[dict[str, Any]]:
    """`error`, by which a page orders its rows, is the mean distance of the students after distillation."""
    students = {name: column for name, column in columns.items() if column.net != "teacher"}
    errors = {name: errors_of(column) for name, column in students.items()}
    after = [errors[name] for name, column in students.items() if column.net == "after"]
    return [
        {
            "prompt": caption,
            "cells": {name: _cell(column, part, i) for name, column in columns.items()},
            "errors": {name: values[i] for name, values in errors.items()},
            "error": sum(values[i] for values in after) / len(after),
        }
        for i, caption in enumerate(captions)
    ]
