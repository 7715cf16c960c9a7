"""The cost and error of removing each unit of a denoiser, as a table, a chart and a page."""

from pathlib import Path

from prunet import __version__
from prunet.denoisers.diagram import STEPS, Diagram
from prunet.denoisers.known import architecture_of
from prunet.denoisers.patterns import is_within
from prunet.disk.files import write_text
from prunet.report.bars import Bar, Panel, draw_bars
from prunet.report.charts import render
from prunet.search.results import Sensitivity
from prunet.words import number, percent, short

#: The chart does not distinguish errors below this, because half precision has errors of this size.
FLOOR = 1e-5
COLUMNS = {"parameters": "parameters", "macs": "MACs", "latency": "latency"}


def write_sensitivity(result: Sensitivity, folder: Path) -> None:
    """Writes `sensitivity.json`, `.md`, `.svg` (the chart) and `.html`."""
    result.save(folder / "sensitivity.json")
    write_text(folder / "sensitivity.md", f"{markdown(result)}\n![The same as a chart](sensitivity.svg)\n")
    write_text(folder / "sensitivity.svg", chart(result))
    page = render(
        "sensitivity.html.j2",
        version=__version__,
        teacher=short(result.teacher),
        result=result,
        net=coloured_diagram(result),
        steps=STEPS,
        chart=chart(result),
        columns=columns(result),
    )
    write_text(folder / "sensitivity.html", page)


def columns(result: Sensitivity) -> dict[str, str]:
    """Returns the kinds of costs that the result has, and their titles."""
    return {kind: title for kind, title in COLUMNS.items() if kind in result.costs}


def rows(result: Sensitivity) -> list[tuple[str, list[str], tuple[float, float, float]]]:
    """Returns for each unit its name, the shares of the teacher's costs that it saves, and its error and interval."""
    return [
        (
            unit.name,
            [share(unit.saves[kind] / result.costs[kind]) for kind in columns(result)],
            (unit.error, unit.low, unit.high),
        )
        for unit in result.units
    ]


def share(value: float) -> str:
    """Formats a share, which is below 0 if a removal makes a call slower."""
    return f"−{percent(-value)}" if value < -0.0005 else percent(max(0.0, value))


def markdown(result: Sensitivity) -> str:
    """Formats one row for each unit."""
    titles = list(columns(result).values())
    lines = [f"| removed | {' | '.join(titles)} | error (95 % interval) |", "|---|" + "---:|" * (len(titles) + 1)]
    for name, shares, error in rows(result):
        value, low, high = (number(part, 2) for part in error)
        lines.append(f"| {name} | {' | '.join(shares)} | {value} ({low} to {high}) |")
    return "\n".join([*lines, "", conditions(result)]) + "\n"


def conditions(result: Sensitivity) -> str:
    """Explains the numbers, and says on which inputs they were measured."""
    timed = f"; latency: {result.device}, a call with batch 2" if "latency" in result.costs else ""
    return (
        "Share of the teacher's costs that each removal saves, and the squared error of the output divided by the "
        f"teacher's squared output, untrained: {result.examples}, {result.precision}{timed}."
    )


def chart(result: Sensitivity) -> str:
    """Charts a bar for each unit, the least error first."""
    bars = []
    for unit in sorted(result.units, key=lambda unit: unit.error):
        colour = sum(unit.error >= step for step in STEPS)
        saves = share(unit.saves["macs"] / result.costs["macs"])
        bars.append(
            Bar(
                label=label(unit.name),
                segments=[(f"colour-{colour}", unit.error)],
                text=f"{number(unit.error, 2)}; {saves} of the MACs",
                whisker=(unit.low, unit.high),
            )
        )
    soft = "relative squared error of the output, logarithmic; the line is the 95 % interval"
    return draw_bars(
        f"The error of each removal from {short(result.teacher)}", soft, [[Panel("Error", "", bars, {}, FLOOR)]]
    )


def label(name: str) -> str:
    """Shortens a unit's name: `down.0.layer.1 + up.3.layer.2`; a layer is a resnet with its attention."""
    return name.replace("_blocks", "").replace("{attentions,resnets}", "layer").replace("transformer.", "block ")


def coloured_diagram(result: Sensitivity) -> Diagram:
    """Returns the teacher's diagram; each part has the least error of the units that remove it."""
    config = result.teacher_config
    diagram = architecture_of(config).diagram(config, ())
    errors: dict[str, float] = {}
    for section in diagram.sections:
        for part in (part for layer in section.layers for part in layer):
            whole = [unit.error for unit in result.units if is_within(part.name, set(unit.remove))]
            if whole:
                errors[part.name] = min(whole)
    return diagram.coloured(errors)
