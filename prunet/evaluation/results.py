"""Reads the results of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet.disk.files import read_label
from prunet.disk.seals import file_checksum
from prunet.errors import UserError


def read_evaluation(folder: Path, steps: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads what `evaluate` wrote into a folder. `steps`: the value of the run's `steps.json`, to check the student by.

    Raises:
        UserError: missing, not readable, changed, of another student, or of a version without intervals.
    """
    again = f"delete {folder} and run it again"
    evaluation = read_label(folder / "evaluation.json", ("distance", "protocol", "sizes"), again)
    if not all("intervals" in distance for distance in evaluation["distance"].values()):
        raise UserError(f"{folder.parent}: evaluated by an older prunet: {again}")
    for name, expected in evaluation.get("pictures", {}).items():
        if (path := folder / name).is_file() and file_checksum(path) != expected:
            raise UserError(f"{path}: damaged or changed (its checksum is another than when it was drawn): {again}")
    student = evaluation["protocol"].get("student")
    last = max((name for name in steps or {} if name.startswith("stage-")), key=lambda n: int(n[6:]), default=None)
    if steps and last and student not in (None, steps[last].get("inputs")):
        raise UserError(f"{folder / 'evaluation.json'}: of another student than {folder.parent / last}: {again}")
    return evaluation
