"""Patterns over module names."""

import difflib
import fnmatch
import itertools
import math
import re
from collections.abc import Container, Iterable, Sequence

from prunet.errors import UserError

#: Names that the patterns of one plan may expand to, since each is tried on every module (SDXL has 100 parts).
MOST_CHOICES = 1000


def expand(pattern: str) -> list[str]:
    """Expands the choices of a pattern: `a.{b,c}.0` gives `a.b.0` and `a.c.0`.

    Raises:
        UserError: the pattern expands to more than `MOST_CHOICES` names.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MOST_CHOICES:
        raise UserError(f"Pattern {pattern!r} stands for more than {MOST_CHOICES:,} names: use * in place of braces")
    return ["".join(parts) for parts in itertools.product(*choices)]


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the names that match; `*`, `?` and `[...]` match within one dotted part, `{a,b}` gives choices."""
    globs = [glob.split(".") for glob in expand(pattern)]

    def fits(name: str) -> bool:
        parts = name.split(".")
        return any(len(parts) == len(glob) and all(map(fnmatch.fnmatchcase, parts, glob)) for glob in globs)

    return [name for name in names if fits(name)]


def removed_parts(
    patterns: Iterable[str], names: Sequence[str], parts: Sequence[str], *, outline: str, parts_help: str
) -> dict[str, str]:
    """Maps each part that `patterns` remove to its pattern.

    Args:
        names, parts: all modules, and the modules that can be removed.
        outline, parts_help: where the parts are, and which parts there are, for the messages.

    Raises:
        UserError: a pattern matches nothing, or a module that cannot be removed.
    """
    removed: dict[str, str] = {}
    patterns, can_go = list(patterns), set(parts)
    if (count := sum(len(expand(pattern)) for pattern in patterns)) > MOST_CHOICES:
        raise UserError(f"The plan's patterns stand for {count:,} names, more than {MOST_CHOICES:,}: use * in them")
    for pattern in patterns:
        found = match(pattern, names)
        if not found:
            near = difflib.get_close_matches(pattern, parts, 1, cutoff=0.3)
            raise UserError(
                f"Pattern {pattern!r} matches no module of this {outline}"
                + (f"; the nearest part is {near[0]}" if near else "")
            )
        if fixed := next((name for name in found if name not in can_go), None):
            raise UserError(f"Pattern {pattern!r} matches {fixed}, which cannot be removed: choose from {parts_help}")
        for name in found:
            removed.setdefault(name, pattern)
    return removed


def around(name: str) -> list[str]:
    """Lists a name and the modules around it: `a.b.c` gives a, a.b, a.b.c."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]


def is_within(name: str, parts: Container[str]) -> bool:
    """Returns whether `name` is one of `parts` or lies in one of them."""
    return any(outer in parts for outer in around(name))
