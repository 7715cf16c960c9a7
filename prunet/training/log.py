"""The log of training, `log.jsonl`."""

import json
from pathlib import Path
from typing import Any

from prunet.disk.files import clear_errors, new_file
from prunet.disk.reading import check_permission
from prunet.errors import UserError


def log_note(row: dict[str, Any]) -> str:
    """Formats a row of the log for the progress bar."""
    parts = [f"{name} {value:.4f}" for name, value in row.items() if name not in ("learning_rate", "images_per_s")]
    return "  ".join([*parts, f"{row['images_per_s']:.3g} images/s"])


class Log:
    """`log.jsonl`: a row for each time the losses are read. A run that resumes drops the rows after its checkpoint."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [row for row in read_log(path) if row["step"] <= start] if path.exists() else []
        with new_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        with clear_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a `log.jsonl`; a last line that a killed process left incomplete is skipped.

    Raises:
        UserError: another line is damaged, or this user may not read the file.
    """
    rows: list[dict[str, Any]] = []
    check_permission(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1].get("step"), int):
                raise TypeError("no step in it")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ValueError) and not line.endswith(b"\n"):
                break
            raise UserError(
                f"{path}: line {number} is damaged ({error}): delete the file (the charts then lack its rows), or "
                f"{path.parent} to train it again"
            ) from error
    return rows
