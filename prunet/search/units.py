"""The units of a denoiser: the smallest sets of parts that can be removed. They are found by trying."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from prunet.console import progress
from prunet.denoisers.known import architecture_of
from prunet.denoisers.patterns import is_within
from prunet.diagram import Diagram, Row
from prunet.errors import UserError
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import Plan


@dataclass(frozen=True)
class Unit:
    """Parts that a plan can remove together, but not one by one."""

    parts: tuple[str, ...]
    derived: Derived

    @cached_property
    def name(self) -> str:
        """Its parts in short form: `mid_block`, `down_blocks.0.{attentions,resnets}.1 + up_blocks.3...`."""
        return " + ".join(patterns_of(self.parts))


def overlap(some: Collection[str], others: Collection[str]) -> bool:
    """Returns whether a part of one collection is, or lies in, a part of the other."""
    return any(is_within(part, others) for part in some) or any(is_within(part, some) for part in others)


def find_units(config: Mapping[str, Any], keep: Sequence[str] = ()) -> list[Unit]:
    """Finds the units of the denoiser of `config`, in its order. A set of parts is a unit if `derive` accepts it.

    Args:
        keep: patterns of parts that must stay.

    Raises:
        UserError: a pattern of `keep` matches no part.
    """
    architecture = architecture_of(config)
    parts, stays = architecture.parts(config), _kept(config, keep)
    found: dict[frozenset[str], Unit] = {}
    failed: list[str] = []
    diagram = architecture.diagram(config, ())
    with progress("Finding units", None) as bar:
        for candidate in _candidates(diagram, parts, failed):
            bar.advance()
            removed = frozenset(candidate)
            if removed in found or overlap(removed, stays):
                continue
            try:
                derived = derive(config, Plan("unit", tuple(sorted(removed))))
            except UserError:
                if len(removed) == 1:
                    failed.append(candidate[0])
                continue
            found[removed] = Unit(tuple(sorted(removed)), derived)
    place = {part: number for number, part in enumerate(parts)}
    return sorted(found.values(), key=lambda unit: (min(place[part] for part in unit.parts), len(unit.parts)))


def _kept(config: Mapping[str, Any], keep: Sequence[str]) -> set[str]:
    try:
        return set(architecture_of(config).removed_parts(config, keep))
    except UserError as error:
        raise UserError(f"--keep: {error}") from error


def _candidates(diagram: Diagram, parts: Sequence[str], failed: list[str]) -> Iterator[tuple[str, ...]]:
    """Yields sets of parts to try, single parts first. `failed`: parts that were refused alone; it grows meanwhile."""
    for part in parts:
        yield (part,)
    # Blocks with the same number, if diffusers has one length for several lists.
    drawn = {part.name for section in diagram.sections for layer in section.layers for part in layer}
    drawn |= {section.name for section in diagram.sections}
    lists = [section for section in diagram.sections if section.is_list]
    blocks = [part for part in failed if part not in drawn or lists]
    for number in dict.fromkeys(part.rpartition(".")[2] for part in blocks):
        together = tuple(part for part in blocks if part.rpartition(".")[2] == number)
        if len(together) > 1:
            yield together
    for row in diagram.rows:
        if not lists:
            yield from _of_row(row)


def _of_row(row: Row) -> Iterator[tuple[str, ...]]:
    """Yields sets of parts in a row of levels: one layer of two levels, all of a kind in a level, whole levels."""
    if row.is_mirrored:
        down, up = (section.layers for section in row.sections)
        yield from (tuple(part.name for part in (*a, *b)) for a in down for b in up)
    else:
        inside = [part.name for layer in row.sections[0].layers for part in layer]
        yield from combinations(inside, 2)
    for section in row.sections:
        kinds: dict[str, list[str]] = {}
        for layer in section.layers:
            for part in layer:
                kinds.setdefault(part.kind, []).append(part.name)
        yield from (tuple(names) for names in kinds.values() if len(names) > 1)
    yield tuple(section.name for section in row.sections)


def patterns_of(parts: Iterable[str]) -> list[str]:
    """Writes parts as few patterns: names that differ in one place become one pattern with choices in braces."""
    patterns = sorted(parts, key=_numbered)
    for place in range(max((name.count(".") for name in patterns), default=0), -1, -1):
        groups: dict[tuple[Any, ...], list[str]] = {}
        for pattern in patterns:
            pieces = pattern.split(".")
            piece = pieces[place] if place < len(pieces) else ""
            # A piece with braces is not merged again, because braces do not nest.
            alone = (piece,) if not piece or "{" in piece else ()
            rest = tuple(pieces[:place]), tuple(pieces[place + 1 :]), alone
            groups.setdefault(rest, []).append(piece)
        patterns = [_joined(rest[0], choices, rest[1]) for rest, choices in groups.items()]
    return patterns


def _joined(before: tuple[str, ...], choices: list[str], after: tuple[str, ...]) -> str:
    choice = choices[0] if len(choices) == 1 else f"{{{','.join(choices)}}}"
    return ".".join([*before, *([choice] if choice else []), *after])


def _numbered(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts `blocks.10` after `blocks.9`."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]
