"""Pairs: which module of the student is compared with which module of the teacher, at four levels of detail.

`block`        the output of every down and up stage, never the mid stage (BK-SDM, arXiv 2305.15798, section 3.2)
`layer`        every resnet and every Transformer2D of the down and up stages, and the mid stage (SSD-1B, arXiv
               2401.02677, section 3: 26 pairs on SDXL)
`attention`    the self-attention of every transformer block; in a stage without one, its last resnet (KOALA, arXiv
               2312.04005, section 3.2)
`transformer`  every transformer block; in a stage without one, its last resnet

Pairs follow the weight map (a student's module is compared with the one that it comes from) but for one case, see
`_block_pairs`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from prunet.denoisers.base import Level, Pair
from prunet.denoisers.taps import tap
from prunet.denoisers.unet2d import form as unet
from prunet.denoisers.unet2d.calls import call_skeleton
from prunet.errors import UserError


def find_pairs(
    teacher: Mapping[str, Any], student: Mapping[str, Any], mapping: Mapping[str, str], level: Level
) -> tuple[Pair, ...]:
    """The pairs of two configs at `level`; `mapping` says where student modules come from (`unet.module_map`).

    Raises:
        UserError: the outputs of a pair have different shapes.
    """
    if level == "block":
        pairs = _block_pairs(teacher, student, mapping)
    else:
        names = {"layer": _layers, "attention": _attentions, "transformer": _transformers}[level]
        pairs = [Pair(name, unet.teacher_name(name, mapping)) for name in names(unet.skeleton(student))]
    check_shapes(teacher, student, pairs)
    return tuple(pairs)


def check_shapes(teacher: Mapping[str, Any], student: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """Compares what the modules of each pair give, on the meta device, so that nothing fails at step 1.

    Raises:
        UserError: the outputs of a pair have different shapes.
    """
    ours, theirs = output_shapes(student), output_shapes(teacher)
    for pair in pairs:
        if ours[pair.student] != theirs[pair.teacher]:
            raise UserError(
                f"{pair.student} of the student gives {ours[pair.student]} and {pair.teacher} of the teacher "
                f"{theirs[pair.teacher]}: they cannot be compared; choose another level of losses"
            )


def output_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its output without the batch, for all modules that can be in a pair."""
    return _output_shapes(json.dumps({key: config[key] for key in sorted(config) if not key.startswith("_")}))


@lru_cache(maxsize=32)
def _output_shapes(text: str) -> dict[str, tuple[int, ...]]:
    config = json.loads(text)
    net = unet.skeleton(config)
    tails = [f"{name}.proj_out" for name in _layers(net) if ".attentions." in name]
    names = [*(name for name, _ in _stages(net)), *tails, *_layers(net), *_transformers(net), *_attentions(net)]
    with tap([net.get_submodule(name) for name in names]) as features:
        call_skeleton(config)
        return {name: tuple(feature.shape[1:]) for name, feature in zip(names, features.take(), strict=True)}


def term_factors(pairs: Sequence[Pair], weights: Mapping[str, float]) -> list[float]:
    """The factor of each pair's term: that of the last pattern that names its teacher module or a part around it, or 1.

    Raises:
        UserError: a pattern that names no pair.
    """
    factors = [1.0] * len(pairs)
    for pattern, weight in weights.items():
        named = [i for i, pair in enumerate(pairs) if unet.match(pattern, _around(pair.teacher))]
        if not named:
            some = ", ".join(pair.teacher for pair in pairs[:3])
            raise UserError(f"losses.weights: {pattern!r} names no module that is compared; there are {some}, ...")
        for i in named:
            factors[i] = float(weight)
    return factors


def _around(name: str) -> list[str]:
    """`a.b.c` -> a, a.b, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _stages(net: Any) -> Iterator[tuple[str, Any]]:
    for side in ("down_blocks", "up_blocks"):
        for i, stage in enumerate(getattr(net, side)):
            yield f"{side}.{i}", stage


def _layers(net: Any) -> Iterator[str]:
    for name, stage in _stages(net):
        for j in range(len(stage.resnets)):
            yield f"{name}.resnets.{j}"
            if getattr(stage, "attentions", None) is not None:
                yield f"{name}.attentions.{j}"
    if net.mid_block is not None:
        yield "mid_block"


def _transformers(net: Any) -> Iterator[str]:
    mid = [("mid_block", net.mid_block)] if net.mid_block is not None else []
    for name, stage in [*_stages(net), *mid]:
        attentions = getattr(stage, "attentions", None) or []
        found = [
            f"{name}.attentions.{j}.transformer_blocks.{b}"
            for j, attention in enumerate(attentions)
            if attention is not None
            for b in range(len(attention.transformer_blocks))
        ]
        if found:
            yield from found
        elif name != "mid_block":
            yield f"{name}.resnets.{len(stage.resnets) - 1}"


def _attentions(net: Any) -> Iterator[str]:
    for name in _transformers(net):
        yield f"{name}.attn1" if ".transformer_blocks." in name else name


def _block_pairs(teacher: Mapping[str, Any], student: Mapping[str, Any], mapping: Mapping[str, str]) -> list[Pair]:
    """A stage that lost its sampler ends at another resolution than the teacher's, so there the last attention's
    `proj_out` (or the last resnet) is compared: the teacher's *last*, which need not be the one inherited.
    """
    pairs = []
    t_net = unet.skeleton(teacher)
    for name, block in _stages(unet.skeleton(student)):
        sampler = "downsamplers" if name.startswith("down") else "upsamplers"
        origin = mapping.get(name, name)
        source = t_net.get_submodule(origin)
        if (getattr(block, sampler, None) is None) == (getattr(source, sampler, None) is None):
            pairs.append(Pair(name, origin))
            continue
        if getattr(block, "attentions", None) is not None:
            tails = [f".attentions.{len(b.attentions) - 1}.proj_out" for b in (block, source)]
        else:
            tails = [f".resnets.{len(b.resnets) - 1}" for b in (block, source)]
        pairs.append(Pair(name + tails[0], origin + tails[1]))
    return pairs
