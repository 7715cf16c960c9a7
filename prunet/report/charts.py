"""The parts of pages: templates, pictures as data, charts as lines in a square of 1000."""

import base64
import io
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from prunet.errors import UserError
from prunet.words import duration, many, number, percent

Point = tuple[float, float]
Row = Mapping[str, Any]
MOST_POINTS = 500  # of a line


def render(template: str, **values: Any) -> str:
    """Renders one of prunet's templates; a missing value is an error."""
    loader, undefined = jinja2.PackageLoader("prunet.report", "."), jinja2.StrictUndefined
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=undefined)
    env.filters |= {"number": number, "many": many, "percent": percent, "duration": duration, "quoted": shlex.quote}
    return env.get_template(template).render(**values)


def is_page(path: Path, kind: str = "") -> bool:
    """Returns whether a file is a page that `render` made, and, if `kind` is given, a page of this kind."""
    with path.open("rb") as file:
        found = re.search(rb'name="generator" content="prunet ([^"]*)"', file.read(4096))
    return found is not None and found[1].decode(errors="replace").endswith(kind)


# -- pictures


def inline(path: Path, side: int) -> dict[str, Any] | None:
    """Returns a picture as a data URI, at most `side` wide and high (PNG if tiny, else WebP); None if it is missing."""
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG",)) as file:
            picture = file.convert("RGB")
    except Exception as error:  # Pillow raises errors of many kinds for a damaged picture
        raise UserError(f"{path}: damaged ({error}): delete its folder and evaluate again") from error
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "png" if max(picture.size) <= 64 else "webp"
    data = io.BytesIO()
    picture.save(data, kind, **({"optimize": True} if kind == "png" else {"quality": 86, "method": 6}))
    text = base64.b64encode(data.getvalue()).decode()
    return {"src": f"data:image/{kind};base64,{text}", "width": picture.width, "height": picture.height}


# -- charts


def draw_chart(
    lines: Mapping[str, list[list[Point]]], right: float, tips: list[tuple[float, str]], *, smooth: bool = False
) -> dict[str, Any] | None:
    """Plots lines over 0 to `right`, y logarithmic, in a square of 1000 that the page stretches; None without points.

    `smooth`: adds smoothed lines and keeps the others as `raw`. `tips`: texts to show by x.
    """
    lines = {name: kept for name, segments in lines.items() if (kept := [s for s in segments if s])}
    values = [y for segments in lines.values() for segment in segments for _, y in segment]
    if not values or not right:
        return None
    low, high = min(values) / 1.08, max(values) * 1.08

    def height(y: float) -> float:
        return math.log(high / y) / math.log(high / low)

    def place(points: list[Point]) -> list[str]:
        return [f"{1000 * x / right:.1f},{1000 * height(y):.1f}" for x, y in thin(points, MOST_POINTS)]

    drawn = []
    for name, segments in lines.items():
        ways = [_smooth(segment) if smooth else segment for segment in segments]
        raw = list(map(place, segments)) if smooth else []
        drawn.append(
            {"name": name, "kind": name, "raw": raw, "points": list(map(place, ways)), "last": ways[-1][-1][1]}
        )
    width = 1000 / max(1, len(tips))
    bands = [(f"{1000 * x / right - width / 2:.1f}", f"{width:.1f}", text) for x, text in tips]
    return {"lines": drawn, "y_ticks": [(100 * height(y), f"{y:.3g}") for y in _log_ticks(low, high)], "tips": bands}


def _smooth(points: list[Point]) -> list[Point]:
    """Returns a centred moving geometric mean. It begins at the first value, so a steep start stays steep."""
    sums = [0.0, *accumulate(math.log(y) for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(i, len(points) // 30)
        first, end = i - reach, min(len(points), i + reach + 1)
        out.append((x, math.exp((sums[end] - sums[first]) / (end - first))))
    return out


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [m * 10.0**k for k in powers for m in digits if low <= m * 10.0**k <= high]
        if len(ticks) >= 3:
            return thin(ticks, 7)
    return [low * (high / low) ** share for share in (0.1, 0.5, 0.9)]


def thin(values: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` of the values, evenly spaced, with both ends."""
    count = len(values)
    return list(values) if count <= most else [values[round(i * (count - 1) / (most - 1))] for i in range(most)]
