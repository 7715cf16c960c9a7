"""Lists of blocks as a diagram: one below the other, each in lines of ten."""

from collections.abc import Iterable, Mapping
from typing import Any

from prunet.diagram import Diagram, Part, Row, Section

#: Blocks a line, so that a block's number can be read from its place.
LINE = 10


def lists_diagram(net: Any, counts: Mapping[str, int], gone: Iterable[str]) -> Diagram:
    """The lists of the skeleton `net`, list -> its blocks, without the blocks `gone`."""
    away = set(gone)
    return Diagram(tuple(_row(net.get_submodule(name), name, away) for name in counts))


def _row(blocks: Any, name: str, gone: set[str]) -> Row:
    names = {f"{name}.{i}": sum(p.numel() for p in block.parameters()) for i, block in enumerate(blocks)}
    parts = [Part("block", block, block in gone, size) for block, size in names.items()]
    kept = sum(part.parameters for part in parts if not part.gone)
    lines = tuple(tuple(parts[i : i + LINE]) for i in range(0, len(parts), LINE))
    return Row(None, (Section(name, False, lines, sum(names.values()), kept),))
