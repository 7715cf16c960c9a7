"""Formulas, written as GitHub reads them, become MathML, which browsers draw without a script."""

import re
from typing import Any

from latex2mathml.converter import convert

#: Blocks are fences of the language `math`.
INLINE = re.compile(r"\$`([^`\n]+)`\$")


def fence(source: str, *_: Any, **__: Any) -> str:
    """A fenced block of LaTeX as MathML (called by pymdownx.superfences)."""
    return _convert(source.strip(), "block")


def inline(markdown: str) -> str:
    """The text of a page with its inline formulas as MathML."""
    return INLINE.sub(lambda found: _convert(found[1], "inline"), markdown)


def _convert(latex: str, display: str) -> str:
    mathml = convert(latex, display=display)
    if unknown := re.search(r"<mi>(&|\\[^<]*)</mi>", mathml):  # it would be shown as it stands
        raise ValueError(f"{unknown[1]} is no command or environment that latex2mathml knows: {latex}")
    return mathml
