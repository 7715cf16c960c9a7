"""The result of `measure`, as a value and as a table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.evaluation.protocol import TITLES
from prunet.intervals import Measure
from prunet.recipe.values import Drawing, EmbeddedGuidance


class MeasuredModel(Value):
    """The model that was measured; `drawn`: how it drew, if not as the protocol says."""

    source: str
    fingerprint: str
    drawn: EmbeddedGuidance | Drawing | None = None

    def __str__(self) -> str:
        return f"{self.source} ({self.drawn})" if self.drawn else self.source


class Measures(Value):
    """The measures of a model (`measures.json`), by the name of their metric.

    `protocol`: its keys, with defaults filled in and without paths and sources. Protocols of other versions may have
    other keys, and two protocols are compared key by key.
    """

    model: MeasuredModel
    protocol: dict[str, Any]
    measures: dict[str, Measure]
    versions: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _whole(self) -> Self:
        try:
            numbers = [value for _, _, found in self.rows for value in (found.value, found.low, found.high)]
            if not self.conditions or not numbers or not all(map(math.isfinite, numbers)):
                raise ValueError("numbers are missing")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its protocol or a metric is not known ({error!r})") from error
        return self

    @property
    def rows(self) -> list[tuple[str, str, Measure]]:
        """Title, better direction, and numbers of each measure. Titles name the model that replaces CLIP."""
        rows, clip = [], self.protocol.get("clip") or {}
        for name, found in self.measures.items():
            title, better = TITLES[name]
            other = clip.get("library") == "transformers" and not clip["model"].startswith("openai/")
            rows.append((title.replace("CLIP", clip["model"]) if other else title, better, found))
        return rows

    @property
    def conditions(self) -> str:
        """Describes the protocol in one line."""
        how = self.protocol
        resized = f" resized to {how['resize']}" if how["resize"] else ""
        return (
            f"Protocol {how['name']} version {how['version']}: {how['count']:,} pictures, {how['sampler']}, "
            f"{how['steps']} steps, guidance {how['guidance_scale']}, {how['size']} px{resized}, seed {how['seed']}"
        )


def read_measures(folder: Path) -> Measures:
    """Reads the result that `measure` wrote into a folder.

    Raises:
        UserError: the result is missing or not whole.
    """
    path = folder / "measures.json"
    if not path.is_file():
        raise UserError(f"{folder}: nothing measured there (no measures.json); `prunet measure` makes one")
    return Measures.load(path, "delete it, or measure again")


def markdown(results: Sequence[Measures]) -> str:
    """Formats results by one protocol as a Markdown table, one row for each model."""
    first = results[0]
    lines = ["| | " + " | ".join(f"{title} ({better} is better)" for title, better, _ in first.rows) + " |"]
    lines.append("|---|" + "---:|" * len(first.rows))
    for result in results:
        row = [f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]" for _, _, found in result.rows]
        lines.append(f"| {result.model} | " + " | ".join(row) + " |")
    lines += ["", f"{first.conditions}; in brackets 95 % intervals over the pictures drawn."]
    return "\n".join(lines) + "\n"
