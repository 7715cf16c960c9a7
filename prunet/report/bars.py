"""Charts of horizontal bars in panels, as an SVG that needs no other file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunet.report.charts import render

WIDTH, MARGIN, GAP = 960, 32, 28  # pixels; GAP between two panels side by side
ROW, BAR = 26, 16  # heights of a row and of the bar in it
LETTER, BOLD = 7.0, 7.9  # widths of a letter at 13 px, rounded up


@dataclass(frozen=True)
class Bar:
    """A bar. `segments`: kinds (colours) and lengths; `note`: small print after the label; `text`: after the bar.

    `mark`: place of a line across the bar; `whisker`: an interval; `track`: length of a pale bar behind it.
    """

    label: str
    segments: Sequence[tuple[str, float]]
    text: str
    note: str = ""
    mark: float | None = None
    whisker: tuple[float, float] | None = None
    track: float | None = None

    @property
    def reach(self) -> float:
        """The largest value that the bar shows."""
        ends = [sum(length for _, length in self.segments), self.mark, self.track, *(self.whisker or ())]
        return float(max(end for end in ends if end is not None))


@dataclass(frozen=True)
class Panel:
    """Bars on one scale. `key`: maps kinds to names, in the order of the legend; `soft`: a subtitle.

    `floor`: where a logarithmic scale begins; None: the scale is linear.
    """

    title: str
    soft: str
    bars: Sequence[Bar]
    key: Mapping[str, str]
    floor: float | None = None

    def length(self, value: float) -> float:
        """Returns a value on the panel's scale."""
        return value if self.floor is None else math.log10(max(1.0, value / self.floor))


def draw_bars(title: str, soft: str, rows: Sequence[Sequence[Panel]]) -> str:
    """Renders the SVG; panels of one row stand side by side."""
    top, placed = 104.0, []
    for row in rows:
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        drawn = [_place(panel, MARGIN + i * (width + GAP), top, width) for i, panel in enumerate(row)]
        placed += drawn
        top = max(panel["bottom"] for panel in drawn) + 44
    return render("bars.svg.j2", title=title, soft=soft, panels=placed, width=WIDTH, height=top - 8, margin=MARGIN)


def _place(panel: Panel, left: float, top: float, width: float) -> dict[str, Any]:
    """Computes all numbers that the template writes."""
    label = min(0.45 * width, max(LETTER * len(f"{bar.label} {bar.note}") for bar in panel.bars) + 20)
    text = max(BOLD * len(bar.text) for bar in panel.bars) + 14
    first, reach = left + label, panel.length(max(bar.reach for bar in panel.bars))
    scale = (width - label - text) / reach if reach else 0.0
    head = top + (46 if panel.key else 24)
    bars = []
    for i, bar in enumerate(panel.bars):
        x, pieces = first, []
        for kind, length in bar.segments:
            pieces.append(
                {"kind": kind, "x": x, "width": max(0.0, width := scale * panel.length(length)), "value": length}
            )
            x += width
        whisker = bar.whisker and [first + scale * panel.length(end) for end in bar.whisker]
        room = int((label - 20) / LETTER) - len(bar.note) - 1
        place = {
            "label": bar.label if len(bar.label) <= room + 1 else f"{bar.label[: max(1, room)]}…",
            "y": head + ROW * i,
            "pieces": pieces,
            "end": first + scale * panel.length(bar.reach) + 8,
            "mark": None if bar.mark is None else first + scale * panel.length(bar.mark),
            "track": None if bar.track is None else scale * panel.length(bar.track),
            "whisker": whisker,
        }
        bars.append({"bar": bar, "place": place})
    key, x = [], left
    for kind, name in panel.key.items():
        key.append((kind, name, x))
        x += 32 + 0.88 * LETTER * len(name)
    bottom = head + ROW * len(bars)
    return {"panel": panel, "left": left, "first": first, "top": top, "bottom": bottom, "bars": bars, "key": key}
