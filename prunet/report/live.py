"""The live page of a run: one file that a browser reloads every few seconds, without a server."""

from pathlib import Path
from typing import Any

from prunet import __version__
from prunet.disk.files import write_text
from prunet.report.charts import inline, render
from prunet.report.curves import loss_chart, read_logs
from prunet.words import duration

SHEET_SIDE = 1600  # longest side in pixels


def write_live(folder: Path, now: dict[str, Any], lines: list[tuple[str, str]], path: Path, every: float) -> None:
    """Writes the page of a run in the state `now` (`prunet.runs.watching.look`), which reloads after `every` seconds.

    `lines`: names and texts, as in the terminal.
    """
    stages = sorted(folder.glob("stage-*"), key=lambda stage: (len(stage.name), stage.name))
    page = render(
        "live.html.j2",
        version=__version__,
        name=folder.resolve().name,
        every=max(1, round(every)) if now["worker"] else None,
        title=title(now),
        lines=lines,
        losses=loss_chart(read_logs(stages, {})),
        sheet=inline(Path(now["sheet"]), SHEET_SIDE) if now["sheet"] else None,
    )
    write_text(path, page)


def title(now: dict[str, Any]) -> str:
    """Returns what a run is doing, in a few words: `stage-1, 40 of 100 steps`."""
    if now["step"] is None:
        return "done"
    counted = f", {now['done']:,}" if now["done"] is not None else ""
    counted += (f" of {now['of']:,}" if now["of"] else "") + (f" {now['unit']}" if counted else "")
    left = f", {duration(now['seconds'])} of training left" if now["seconds"] and now["worker"] else ""
    return f"{now['step']}{counted}{left}"
