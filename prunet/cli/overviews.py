"""Verbs that only look: the runs in a folder, and what prunet has to work with here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import Json, app, say


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A folder with runs in it, or in folders of it.")] = Path(),
    as_json: Json = False,
) -> None:
    """List runs: how far each is, its plan, the student's size and its distance from the teacher."""
    from prunet.runs.listing import find_runs

    runs = find_runs(folder)
    say(as_json, {"runs": runs}, _runs_view(runs) if runs else f"{folder}: no runs here; `prunet run RECIPE` makes one")


def _runs_view(runs: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from prunet.words import many, number, percent

    table = Table("run", "state", "plan", "parameters", "distance", "disk", box=None)
    for run in runs:
        state = run["state"] + (f", at work: {run['worker']}" if run["worker"] else "")
        size = f"{many(run['parameters'])} ({percent(run['share'])})" if run["parameters"] else ""
        before_after = [run[name] for name in ("before", "after")]
        distance = " → ".join(map(number, before_after)) if None not in before_after else ""
        cells = (run["run"], state, run["plan"] or "", size, distance, f"{many(run['bytes'])}B")
        table.add_row(*map(Text, cells))
    return table


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what prunet has to work with: versions, device, memory, disk, the hub, optional parts.

    Put its output into a report of a problem.
    """
    from prunet.runs.doctor import examine

    facts = examine()
    say(as_json, facts, _doctor_view(facts))


def _doctor_view(facts: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

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
        ("compiler", facts["compiler"] or "none, so that --compile does not work"),
    ]
    for at, (extra, found) in enumerate(facts["extras"].items()):
        state = f"pip install 'prunet[{extra}]'" if found["missing"] else "there"
        rows.append(("optional" if not at else "", f"{extra}: {state} ({found['for']})"))
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    return table
