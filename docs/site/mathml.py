"""Formulas, written as GitHub reads them, become MathML, which browsers draw without a script."""

import re
from typing import Any

from latex2mathml.converter import convert

#: Blocks are fences of the language `math`.
INLINE = re.compile(r"\$`([^`\n]+)`\$")


def fence(source: str, *_: Any, **__: Any) -> str:
    """A fenced block of LaTeX as MathML (called by pymdownx.superfences)."""
    return convert(source.strip(), display="block")


def inline(markdown: str) -> str:
    """The text of a page with its inline formulas as MathML."""
    return INLINE.sub(lambda found: convert(found[1]), markdown)
