"""Lists of blocks as a diagram: the lists below each other, each in lines of ten blocks."""

from collections.abc import Iterable, Mapping
from typing import Any

from prunet.denoisers.diagram import Diagram, Part, Row, Section

#: Blocks in a line; with ten, the place of a block shows its number.
LINE = 10


def lists_diagram(net: Any, counts: Mapping[str, int], gone: Iterable[str]) -> Diagram:
    """Returns the diagram of the skeleton `net`, with the blocks `gone` marked; `counts`: blocks of each list."""
    away = set(gone)
    return Diagram(tuple(_row(net.get_submodule(name), name, away) for name in counts))


def _row(blocks: Any, name: str, gone: set[str]) -> Row:
    names = {f"{name}.{i}": sum(p.numel() for p in block.parameters()) for i, block in enumerate(blocks)}
    parts = [Part("block", block, block in gone, size) for block, size in names.items()]
    kept = sum(part.parameters for part in parts if not part.gone)
    lines = tuple(tuple(parts[i : i + LINE]) for i in range(0, len(parts), LINE))
    return Row(None, (Section(name, False, lines, sum(names.values()), kept),))
