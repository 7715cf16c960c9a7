"""What the terminal shows while work goes on. All of it goes to stderr: stdout is for results."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)


@contextmanager
def progress(text: str, total: float | None) -> Iterator["Bar"]:
    """A bar with count, time gone and time left; on a file or pipe it prints nothing."""
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        yield Bar(shown, shown.add_task(text, total=total, note=""))


class Bar:
    """One line of progress."""

    def __init__(self, shown: Progress, task: int) -> None:
        self._shown, self._task = shown, task

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self._shown.advance(self._task, steps)  # type: ignore[arg-type]
        if note is not None:
            self._shown.update(self._task, note=note)  # type: ignore[arg-type]


def say(text: str) -> None:
    """One line about what happens."""
    console.print(text)
