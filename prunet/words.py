"""Numbers, names and times in readable form."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunet.errors import UserError


def number(value: float, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits, commas at thousands, and an exponent only below 0.0001."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 9.99 may become 10
    return f"{value:.1e}" if size < -4 else f"{value:,.{max(0, digits - 1 - size)}f}"


def many(count: float, digits: int = 3) -> str:
    """Formats a count as papers do: 266 k, 2,567 M parameters, 338 G multiply-adds."""
    unit, scale = ("G", 1e9) if count >= 1e10 else ("M", 1e6) if count >= 1e6 else ("k", 1e3)
    return f"{number(count / scale, digits)} {unit}"


def percent(share: float) -> str:
    """Formats a share as a percentage: 12 %, 3.4 %."""
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Formats seconds as s, min or h."""
    scale, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{number(seconds / scale, 2)} {unit}"


def short(source: str) -> str:
    """Returns a hub id unchanged, and only the last name of a path, because the folders above it are private."""
    parts = source.replace("\\", "/").rstrip("/").split("/")
    return source if len(parts) == 2 and parts[0] not in (".", "..", "", "~") else parts[-1]


def command(*words: object) -> str:
    """Returns a command of prunet for a message, in backticks, with its words quoted for a shell."""
    return f"`{shlex.join(['prunet', *map(str, words)])}`"


def without_home(text: str) -> str:
    """Returns `text` with the user's home folder as `~`, because its name is private; recipes expand `~`."""
    return text.replace(f"{Path.home()}/", "~/")


def config_for(source: Path | str, config: str | None, sources: Sequence[Path | str]) -> str | None:
    """Returns the `config` of several sources for one of them: only files need it, if there are any."""
    return config if Path(source).is_file() or not any(Path(other).is_file() for other in sources) else None


def names_of(sources: Sequence[Path | str]) -> list[str]:
    """Returns the shortest ends of paths that are all different.

    Raises:
        UserError: a path is given twice.
    """
    parts = [Path(source).resolve().parts for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(source for i, source in enumerate(sources) if parts[i] in parts[:i])
    raise UserError(f"{twice} is given twice")


def brief(value: Any, longest: int = 60) -> str:
    """Returns the text of a value, cut with `...` to at most `longest` characters."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Returns the first difference of two nested mappings as `data.flip False, now True`; None if they are equal."""
    before, now = _leaves(old), _leaves(new)
    key = next((key for key in now | before if before.get(key) != now.get(key)), None)
    if key is None:
        return None
    return f"{key} {brief(before.get(key))}, now {brief(now.get(key))}"


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for name, item in items:
        found |= _leaves(item, f"{key}.{name}" if key else str(name))
    return found or {key: value}
