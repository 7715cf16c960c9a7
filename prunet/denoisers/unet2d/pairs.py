"""Pairs: the modules of student and teacher that distillation compares, at four levels of detail.

`block`        the output of every down and up block, never the mid block (BK-SDM, arXiv 2305.15798, section 3.2)
`layer`        every resnet and every Transformer2D of the down and up blocks, and the mid block (SSD-1B, arXiv
               2401.02677, section 3: 26 pairs on SDXL)
`attention`    the self-attention of every transformer block; in a down or up block without one, its last resnet (KOALA,
               arXiv 2312.04005, section 3.2)
`transformer`  every transformer block; in a down or up block without one, its last resnet

Pairs follow the weight map: a student's module is compared with the teacher's module that it inherits from.
`_block_pairs` has the one exception.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prunet.denoisers.form import teacher_name
from prunet.denoisers.pairs import Level, Pair


def find_pairs(teacher: Any, student: Any, mapping: Mapping[str, str], level: Level) -> list[Pair]:
    """Returns the pairs of two U-Nets at `level`; `mapping` maps student modules to teacher modules."""
    if level == "block":
        return _block_pairs(teacher, student, mapping)
    names = {"layer": _layers, "attention": _attentions, "transformer": _transformers}[level]
    return [Pair(name, teacher_name(name, mapping)) for name in names(student)]


def _levels(net: Any) -> Iterator[tuple[str, Any]]:
    for side in ("down_blocks", "up_blocks"):
        for i, block in enumerate(getattr(net, side)):
            yield f"{side}.{i}", block


def _layers(net: Any) -> Iterator[str]:
    for name, block in _levels(net):
        for j in range(len(block.resnets)):
            yield f"{name}.resnets.{j}"
            if getattr(block, "attentions", None) is not None:
                yield f"{name}.attentions.{j}"
    if net.mid_block is not None:
        yield "mid_block"


def _transformers(net: Any) -> Iterator[str]:
    mid = [("mid_block", net.mid_block)] if net.mid_block is not None else []
    for name, block in [*_levels(net), *mid]:
        attentions = getattr(block, "attentions", None) or []
        found = [
            f"{name}.attentions.{j}.transformer_blocks.{b}"
            for j, attention in enumerate(attentions)
            if attention is not None
            for b in range(len(attention.transformer_blocks))
        ]
        if found:
            yield from found
        elif name != "mid_block":
            yield f"{name}.resnets.{len(block.resnets) - 1}"


def _attentions(net: Any) -> Iterator[str]:
    for name in _transformers(net):
        yield f"{name}.attn1" if ".transformer_blocks." in name else name


def _block_pairs(teacher: Any, student: Any, mapping: Mapping[str, str]) -> list[Pair]:
    """Returns the pairs of down and up blocks.

    A block that lost its sampler ends at another resolution than the teacher's. There the last attention's `proj_out`
    (or the last resnet) is compared with the teacher's *last*, which need not be the one that it inherits from.
    """
    pairs = []
    for name, block in _levels(student):
        sampler = "downsamplers" if name.startswith("down") else "upsamplers"
        origin = mapping.get(name, name)
        source = teacher.get_submodule(origin)
        if (getattr(block, sampler, None) is None) == (getattr(source, sampler, None) is None):
            pairs.append(Pair(name, origin))
            continue
        if getattr(block, "attentions", None) is not None:
            tails = [f".attentions.{len(b.attentions) - 1}.proj_out" for b in (block, source)]
        else:
            tails = [f".resnets.{len(b.resnets) - 1}" for b in (block, source)]
        pairs.append(Pair(name + tails[0], origin + tails[1]))
    return pairs
