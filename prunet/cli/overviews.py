"""Verbs that only read: the runs in a folder, the progress of a run, and what this machine has for prunet."""

import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunet.cli.options import Json, app, say

if TYPE_CHECKING:
    from prunet.report.live import Activity
    from prunet.runs.listing import FoundRun


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A folder that contains runs, itself or in its folders.")] = Path(),
    as_json: Json = False,
) -> None:
    """List runs with their progress, plan, size of the student and distance from the teacher."""
    from prunet.runs.listing import find_runs

    runs = find_runs(folder)
    say(
        as_json,
        {"runs": [asdict(run) for run in runs]},
        _runs_view(runs) if runs else f"{folder}: no runs here; `prunet run RECIPE` makes one",
    )


def _runs_view(runs: "list[FoundRun]") -> Any:
    from rich.table import Table
    from rich.text import Text

    from prunet.words import many, number, percent

    table = Table("run", "state", "plan", "parameters", "distance", "disk", box=None)
    for run in runs:
        state = run.state + (f", at work: {run.worker}" if run.worker else "")
        size, distance = "", ""
        if run.parameters and run.share:
            size = f"{many(run.parameters)} ({percent(run.share)})"
        if run.before is not None and run.after is not None:
            distance = f"{number(run.before)} → {number(run.after)}"
        cells = (run.run, state, run.plan or "", size, distance, f"{many(run.bytes)}B")
        table.add_row(*map(Text, cells))
    return table


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may be at work or stopped.")],
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="Seconds between two updates.")] = 5,
    page: Annotated[Path | None, typer.Option(help="Also write this page, which a browser reloads by itself.")] = None,
    as_json: Json = False,
) -> None:
    """Watch a run from another terminal: losses, time left, the next steps, device use, the last sheet.

    Updates until no command works in the run folder any more. With --json, and if the output is not a terminal and
    --page is not given, it prints once. Nothing is written into the run folder.
    """
    from rich.live import Live

    from prunet.console import results
    from prunet.disk.ownership import check_file
    from prunet.report.charts import is_page
    from prunet.report.live import write_live
    from prunet.runs.watching import look

    if page:
        check_file(page, "page", "--page", lambda path: is_page(path, "live"))
    now = look(run)
    once = as_json or not (page or results.is_terminal)
    shown = Live(console=results, auto_refresh=False) if results.is_terminal and not as_json else nullcontext()
    with suppress(KeyboardInterrupt), shown as live:  # Ctrl-C ends the watching, not the run
        while True:
            if page:
                write_live(run, now, _watch_lines(now), page, every)
            if live:
                live.update(_watch_view(now), refresh=True)
            if once or not now.worker:
                break
            time.sleep(every)
            now = look(run)
    if not live:
        say(as_json, asdict(now), _watch_view(now))


def _watch_lines(now: "Activity") -> list[tuple[str, str]]:
    """Returns the lines about a run: names and texts."""
    from prunet.words import command, duration, number

    again = "" if now.step is None else f": {command('run', now.run)} resumes it"
    lines = [("at work", now.worker.rstrip(",") if now.worker else f"nobody on this machine{again}")]
    if row := now.last:
        losses = [name for name in ("loss", "task", "output", "feature") if name in row]
        first = now.first or row
        lines.append(("losses", ", ".join(f"{n} {number(first.get(n, row[n]))} → {number(row[n])}" for n in losses)))
        lines.append(("speed", f"{number(row.get('images_per_s', 0))} images/s, at step {row['step']:,}"))
    if now.step is not None:
        left = f"{duration(now.seconds)} of training" if now.seconds is not None else "not known before training"
        lines.append(("left", left))
        lines.append(("next", ", ".join(now.next) or "nothing more"))
    for device in now.devices:
        memory = f"{device.used / 2**30:.1f} of {device.total / 2**30:.1f} GiB"
        lines.append(("device", f"{device.name}: {device.busy:.0%} busy, {memory}"))
    return [*lines, ("sheet", now.sheet or "none yet")]


def _watch_view(now: "Activity") -> Any:
    from prunet.report.live import title

    return _two_columns([("run", now.run), ("now", title(now)), *_watch_lines(now)])


def _two_columns(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    return table


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has for prunet: versions, device, memory, disk, the hub, optional packages.

    Add the output when you report a problem.
    """
    from prunet.runs.doctor import examine

    facts = examine()
    say(as_json, facts, _doctor_view(facts))


def _doctor_view(facts: dict[str, Any]) -> Any:
    def gib(count: int) -> str:
        return f"{count / 2**30:,.1f} GiB"

    device, memory = facts["device"], facts["memory"]
    fast = {"bf16": "bf16: yes", "fp16": "bf16: no, fp16 instead", "no": "bf16: no, full precision instead"}
    where = f"{device['count']} x {device['name']}" if device["kind"] == "cuda" else device["name"]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("system", facts["system"]),
        ("device", f"{where}, {device['threads']} threads; {fast[device['precision']]}"),
        ("memory", f"{gib(memory['free'])} free of {gib(memory['total'])}"),
        *([("", f"device: {gib(memory['device free'])} free")] if "device free" in memory else []),
        *(
            ("disk" if not i else "", f"{gib(free)} free, {name}")
            for i, (name, free) in enumerate(facts["disk"].items())
        ),
        ("hub", f"{facts['hub']['endpoint']}: {facts['hub']['state']}"),
        ("compiler", facts["compiler"] or "none, so --compile does not work"),
    ]
    for at, (extra, found) in enumerate(facts["extras"].items()):
        state = f"pip install 'prunet[{extra}]'" if found["missing"] else "installed"
        rows.append(("optional" if not at else "", f"{extra}: {state} ({found['for']})"))
    return _two_columns(rows)
