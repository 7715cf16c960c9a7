"""What the terminal shows. What is said while work goes on is for stderr: stdout is for results."""

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

from prunet.errors import printable
from prunet.processes import is_main


class _Printable(Console):
    """Obeys rich's own styles, and nothing that stands in a text: a file may be named so as to clear the screen."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's segments, their texts made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


#: Of several processes one speaks.
console = _Printable(stderr=True, highlight=False, quiet=not is_main())
#: Results that are more than lines: tables, drawings.
results = _Printable()


#: Seconds between two lines where there is no terminal to draw a bar on.
LINE_EVERY = 60


@contextmanager
def progress(text: str, total: float | None) -> Iterator["Bar"]:
    """A bar with count, time gone and time left; on a file or pipe a line now and then."""
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
    with Progress(*columns, console=console, disable=console.quiet or not (console.is_terminal and text)) as shown:
        yield Bar(shown, text, total)


class Bar:
    """One line of progress."""

    def __init__(self, shown: Progress, text: str, total: float | None) -> None:
        text = escape(text)  # a folder may be named [/like this]
        self._shown, self._task = shown, shown.add_task(text, total=total, note="")
        self._text, self._total, self._done, self._note = text, total, 0.0, ""
        self._printed, self._printed_at = time.monotonic(), 0.0

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        if not self._done and steps > 1:
            self._printed_at = steps  # done before this process began
        self._done += steps
        self._note = self._note if note is None else escape(note)
        self._shown.update(self._task, advance=steps, note=self._note)
        now = time.monotonic()
        if not console.is_terminal and self._text and now - self._printed > LINE_EVERY:
            of = ""
            if self._total and self._done > self._printed_at:  # at the pace since the line before
                pace = (now - self._printed) / (self._done - self._printed_at)
                of = f" of {self._total:g}, {timedelta(seconds=round(pace * (self._total - self._done)))} left"
            self._printed, self._printed_at = now, self._done
            say(f"  {self._text}: {self._done:g}{of}  {self._note}")


def say(text: str) -> None:
    """One line about what happens, in rich's markup."""
    console.print(text, soft_wrap=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts diffusers and transformers report errors alone and draw no bars. What they warn of (a processor
    that is not used, a text that is cut, an argument of later versions) is prunet's business.
    """
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    both = (of_diffusers, of_transformers)
    before = [(logging, logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in both]
    for logging in both:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logging, verbosity, bars in before:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
