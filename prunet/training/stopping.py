"""Stops at a signal only at the end of a training step, so that a checkpoint can keep the step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prunet import processes
from prunet.console import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Remembers whether a signal came."""

    def __init__(self) -> None:
        self._came: tuple[int, Any] | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._came is not None

    def check(self) -> None:
        """Stops if a signal came: usually raises KeyboardInterrupt."""
        if self._came is not None:
            number, handler = self._came
            handler(number, None)


@contextmanager
def stops_after_step() -> Iterator[Stop]:
    """Inside the `with` block the first signal only asks to stop; a second one stops at once.

    With several processes the first signal stops at once: otherwise they would end at different steps and wait for each
    other.
    """
    stop = Stop()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    mine = {number: handler for number, handler in handlers.items() if callable(handler)}

    def ask(number: int, frame: Any) -> None:
        stop._came = number, mine[signal.Signals(number)]
        restore()
        say("Stopping after this step, with a checkpoint; the same signal again stops at once")

    def restore() -> None:
        for number, handler in mine.items():
            signal.signal(number, handler)

    if processes.count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for number in mine:
        signal.signal(number, ask)
    try:
        yield stop
        stop.check()  # the signal came after the last step
    finally:
        restore()
