"""The live page of a run: one file that a browser reloads every few seconds, without a server."""

from dataclasses import dataclass
from pathlib import Path

from prunet import __version__
from prunet.disk.files import write_text
from prunet.report.charts import Row, inline, render
from prunet.report.curves import loss_chart, read_logs
from prunet.words import duration

SHEET_SIDE = 1600  # longest side in pixels


@dataclass(frozen=True)
class Device:
    """A device: the share of time that it is `busy` (0 to 1), and the `used` and `total` bytes of its memory."""

    name: str
    busy: float
    used: int
    total: int


@dataclass(frozen=True)
class Activity:
    """The state of a run.

    `step`: the current step (None: all are done), with `done` of `of` pieces of the kind `unit`. `next`: the steps
    after it. `seconds`: left of all training steps (None: not known yet). `first`, `last`: rows of the log. `worker`:
    the process that works in the run.
    """

    run: str
    worker: str | None
    step: str | None
    next: list[str]
    done: int | None
    of: int | None
    unit: str
    seconds: float | None
    first: Row | None
    last: Row | None
    sheet: str | None
    devices: list[Device]


def write_live(folder: Path, now: Activity, lines: list[tuple[str, str]], path: Path, every: float) -> None:
    """Writes the page of a run in the state `now` (`prunet.runs.watching.look`), which reloads after `every` seconds.

    `lines`: names and texts, as in the terminal.
    """
    stages = sorted(folder.glob("stage-*"), key=lambda stage: (len(stage.name), stage.name))
    page = render(
        "live.html.j2",
        version=__version__,
        name=folder.resolve().name,
        every=max(1, round(every)) if now.worker else None,
        title=title(now),
        lines=lines,
        losses=loss_chart(read_logs(stages, {})),
        sheet=inline(Path(now.sheet), SHEET_SIDE) if now.sheet else None,
    )
    write_text(path, page)


def title(now: Activity) -> str:
    """Returns what a run is doing, in a few words: `stage-1, 40 of 100 steps`."""
    if now.step is None:
        return "done"
    counted = f", {now.done:,}" if now.done is not None else ""
    counted += (f" of {now.of:,}" if now.of else "") + (f" {now.unit}" if counted else "")
    left = f", {duration(now.seconds)} of training left" if now.seconds and now.worker else ""
    return f"{now.step}{counted}{left}"
