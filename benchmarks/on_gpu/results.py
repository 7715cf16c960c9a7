"""The results of a section, and its setting."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Setting:
    """The device; whether on small models (`smoke`); the folders for results (`out`) and for large files (`work`)."""

    device: torch.device
    smoke: bool
    out: Path
    work: Path


@dataclass(frozen=True)
class Result:
    """One line of the table.

    `ok`: whether a check held (None: only measured). `goal`: what `value` should be; `reached`: whether it is.
    """

    name: str
    value: float | None = None
    unit: str = ""
    ok: bool | None = None
    goal: str = ""
    reached: bool | None = None
    note: str = ""

    def cells(self) -> str:
        """The row's cells in Markdown."""
        measured = "" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        state = {None: "", True: "ok", False: "FAILED"}[self.ok]
        if self.reached is not None:
            state = "reached" if self.reached else "missed"
        note = " ".join(self.note.split())[:300].replace("|", "\\|")
        return f"{self.name} | {measured} | {self.goal} | {state} | {note}"


def check(name: str, value: float, at_most: float, unit: str = "", note: str = "") -> Result:
    """Returns a check that passes if `value` is a number and at most `at_most`."""
    return Result(name, value, unit, ok=value <= at_most, goal=f"≤ {at_most:g}", note=note)


def failed(name: str, error: BaseException) -> Result:
    """Returns the row of a check that could not run."""
    import traceback

    traceback.print_exception(error)
    return Result(name, ok=False, note=f"{type(error).__name__}: {error}")


def goal(name: str, value: float, at_least: float, unit: str = "", note: str = "", meant: bool = True) -> Result:
    """Returns a measure with a goal; `meant` is False in a smoke run, whose speeds mean nothing."""
    reached = value >= at_least if meant else None
    return Result(name, value, unit, goal=f"≥ {at_least:g}", reached=reached, note=note)
