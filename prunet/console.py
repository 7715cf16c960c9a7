"""Output in the terminal: progress and remarks on stderr, results on stdout."""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column

from prunet.errors import printable
from prunet.processes import is_main


class _Printable(Console):
    """A console that shows rich's styles but writes out control characters: a file name could clear the screen."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Returns rich's segments, with their texts made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


#: If several processes share the work, only the main process prints.
console = _Printable(stderr=True, highlight=False, quiet=not is_main())
#: For results with styles: tables and diagrams.
results = _Printable()

#: Seconds between two lines of progress where stderr is not a terminal.
LINE_EVERY = 60


@contextmanager
def progress(text: str, total: float | None) -> Iterator["Bar"]:
    """Shows a bar with count, elapsed and remaining time; on a file or pipe, a line every `LINE_EVERY` seconds."""
    # The note comes last and takes the remaining width, so a narrow terminal cuts the note, not the count or the time.
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("<"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    disable = console.quiet or not (console.is_terminal and text)
    with Progress(*columns, console=console, disable=disable, expand=True) as shown:
        yield Bar(shown, text, total)


class Bar:
    """One line of progress."""

    def __init__(self, shown: Progress, text: str, total: float | None) -> None:
        text = escape(text)  # a folder may be named [/like this]
        self._shown, self._task = shown, shown.add_task(text, total=total, note="")
        self._text, self._total, self._done, self._note = text, total, 0.0, ""
        self._printed, self._printed_at = time.monotonic(), 0.0

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Adds `steps` to the count; `note` replaces the text beside it, if given."""
        if not self._done and steps > 1:
            self._printed_at = steps  # these were done before the command was resumed
        self._done += steps
        self._note = self._note if note is None else escape(note)
        self._shown.update(self._task, advance=steps, note=self._note)
        now = time.monotonic()
        if not console.is_terminal and self._text and now - self._printed > LINE_EVERY:
            of = ""
            if self._total and self._done > self._printed_at:  # at the pace since the last line
                pace = (now - self._printed) / (self._done - self._printed_at)
                of = f" of {self._total:g}, {timedelta(seconds=round(pace * (self._total - self._done)))} left"
            self._printed, self._printed_at = now, self._done
            say(f"  {self._text}: {self._done:g}{of}  {self._note}")


def say(text: str) -> None:
    """Prints one line on stderr, in rich's markup."""
    console.print(text, soft_wrap=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Lets diffusers and transformers print only errors.

    Their warnings (a processor that is not used, a text that is cut, an argument of later versions) are about things
    that prunet does on purpose or reports itself.
    """
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    both = (of_diffusers, of_transformers)
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in both]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # An environment variable may fix the hub's progress bars; the hub then warns at each change.
        warnings.filterwarnings("ignore", "Cannot (dis|en)able progress bars", UserWarning)
        for logging in both:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        try:
            yield
        finally:
            for logging, verbosity, bars in before:
                logging.set_verbosity(verbosity)
                if bars:
                    logging.enable_progress_bar()
