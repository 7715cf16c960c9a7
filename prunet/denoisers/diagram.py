"""The diagram of a denoiser, for terminal and page."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

#: Relative squared errors at which the colour of a part changes.
STEPS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Part:
    """A module that can be removed."""

    kind: str  # "resnet", "attention", "downsampler", "upsampler", "block"
    name: str
    gone: bool
    parameters: int
    blocks: tuple[bool, ...] = ()  # for each transformer block in it, whether it stays
    error: float | None = None  # the least error of the removals that include it, if measured

    @property
    def colour(self) -> int | None:
        """The number of `STEPS` that its error reaches; None if it was not measured."""
        return None if self.error is None else sum(self.error >= step for step in STEPS)


@dataclass(frozen=True)
class Section:
    """Parts in order, grouped in layers that belong together."""

    name: str
    gone: bool
    layers: tuple[tuple[Part, ...], ...]
    parameters: int
    kept: int  # parameters that stay

    @property
    def is_list(self) -> bool:
        """Whether the section is a list of equal blocks, shown by numbers; its layers are then lines of blocks."""
        return all(part.kind == "block" for layer in self.layers for part in layer)

    @property
    def stays(self) -> tuple[int, int]:
        """The number of parts that stay, and the number of all parts."""
        gone = [part.gone for layer in self.layers for part in layer]
        return gone.count(False), len(gone)


@dataclass(frozen=True)
class Row:
    """Sections side by side: a down section and its mirrored up section, or one section alone."""

    width: int | None  # channels; None if all sections have the same
    sections: tuple[Section, ...]

    @property
    def is_mirrored(self) -> bool:
        """Whether skip connections lead from one section to the other."""
        return len(self.sections) == 2


@dataclass(frozen=True)
class Diagram:
    """The rows from top to bottom."""

    rows: tuple[Row, ...]

    @property
    def sections(self) -> list[Section]:
        """All sections, row by row."""
        return [section for row in self.rows for section in row.sections]

    def coloured(self, errors: Mapping[str, float]) -> "Diagram":
        """Returns the diagram with the error of each part, given by name."""

        def layer(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(replace(part, error=errors.get(part.name)) for part in parts)

        def section(one: Section) -> Section:
            return replace(one, layers=tuple(map(layer, one.layers)))

        return Diagram(tuple(replace(row, sections=tuple(map(section, row.sections))) for row in self.rows))

    @property
    def largest(self) -> int:
        """Parameters of the largest section."""
        return max(section.parameters for section in self.sections)

    @property
    def tally(self) -> dict[str, tuple[int, int]]:
        """Maps each kind of part to the number that stay and the number of all.

        Transformer blocks are a kind if an attention has several.
        """
        parts = [part for section in self.sections for layer in section.layers for part in layer]
        counts: dict[str, list[bool]] = {}
        for part in parts:
            if "sampler" not in part.kind:
                counts.setdefault(part.kind, []).append(not part.gone)
        blocks = [stays and not part.gone for part in parts for stays in part.blocks]
        if len(blocks) > len(counts.get("attention", blocks)):
            counts["transformer block"] = blocks
        return {kind: (sum(stays), len(stays)) for kind, stays in counts.items()}
