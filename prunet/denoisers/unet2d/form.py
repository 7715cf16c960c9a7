"""The forms of `UNet2DConditionModel`: the parts that can be removed, and the stock config of a student.

Everything here works on configs and skeletons (modules on the meta device); no weight is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel

from prunet.errors import UserError

Config = dict[str, Any]

#: Names that a plan may remove: levels, layers of a level, transformer blocks of an attention, down- and upsamplers.
PART = re.compile(
    r"(down_blocks|up_blocks)\.\d+(\.(resnets|attentions)\.\d+(\.transformer_blocks\.\d+)?"
    r"|\.(downsamplers|upsamplers)(\.0)?)?"
    r"|mid_block(\.(resnets|attentions)\.\d+(\.transformer_blocks\.\d+)?)?"
)
PER_LEVEL_FIELDS = ("cross_attention_dim", "attention_head_dim", "only_cross_attention")


@dataclass(frozen=True)
class Layer:
    """One layer of a level that stays: a resnet and the blocks of its attention, by their indices in the teacher."""

    resnet: int
    blocks: tuple[int, ...] | None  # the transformer blocks that stay; None: no attention


@dataclass(frozen=True)
class UNetLevel:
    """One down or up level that stays, with its index in the teacher."""

    index: int
    layers: tuple[Layer, ...]

    @property
    def has_attention(self) -> bool:
        """Whether its layers have attentions."""
        return any(layer.blocks is not None for layer in self.layers)


def make_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Makes the U-Net of `config` from its fields.

    `from_config` is not used, because it ignores an override if the loaded config had the default (`mid_block_type:
    None` silently became a mid block again).
    """
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**fields)


def _layers(module: Any, name: str, removed: Mapping[str, str]) -> tuple[Layer, ...]:
    """Returns the layers of a down or up level that stay, in order. Refuses levels that diffusers has no form for."""
    attentions = getattr(module, "attentions", None)
    kept: list[Layer] = []
    for j in range(len(module.resnets)):
        resnet, attention = f"{name}.resnets.{j}", f"{name}.attentions.{j}"
        blocks = None
        if attentions is not None and attention not in removed:
            blocks = _blocks(attentions[j], attention, removed)
        if resnet in removed:
            if blocks is not None:
                raise UserError(
                    f"Pattern {removed[resnet]!r} removes {resnet} but not {attention}, and diffusers has no form for "
                    f"an attention without its resnet: remove {name}.{{resnets,attentions}}.{j} together"
                )
            continue
        kept.append(Layer(j, blocks))
    if not kept:
        raise UserError(f"The plan removes every resnet of {name}: remove the level {name!r} itself instead")
    with_attention = [layer for layer in kept if layer.blocks is not None]
    if with_attention and len(with_attention) < len(kept):
        j = next(layer.resnet for layer in kept if layer.blocks is None)
        raise UserError(
            f"Pattern {removed[f'{name}.attentions.{j}']!r} removes {name}.attentions.{j} but not its resnet, and "
            f"diffusers has no form for a level where some resnets have an attention: remove "
            f"{name}.{{resnets,attentions}}.{j} together, or all of {name}.attentions.*"
        )
    return tuple(kept)


def _blocks(attention: Any, name: str, removed: Mapping[str, str]) -> tuple[int, ...]:
    count = len(attention.transformer_blocks)
    kept = tuple(b for b in range(count) if f"{name}.transformer_blocks.{b}" not in removed)
    if not kept:
        raise UserError(
            f"Pattern {removed[f'{name}.transformer_blocks.0']!r} removes all {count} transformer blocks of {name}: "
            f"remove {name} itself, with its resnet, instead"
        )
    return kept


def _lacks_mirror(i: int, side: str, other: str, net: Any, removed: Mapping[str, str]) -> bool:
    return f"{side}.{i}" in removed and f"{other}.{len(net.down_blocks) - 1 - i}" not in removed


def kept_levels(net: Any, removed: Mapping[str, str]) -> tuple[list[UNetLevel], list[UNetLevel]]:
    """Returns the down and up levels that stay, checked against each other: a skip connection needs both its ends."""
    sides: dict[str, list[UNetLevel]] = {}
    for side in ("down_blocks", "up_blocks"):
        sides[side] = [
            UNetLevel(i, _layers(module, f"{side}.{i}", removed))
            for i, module in enumerate(getattr(net, side))
            if f"{side}.{i}" not in removed
        ]
    down, up = sides["down_blocks"], sides["up_blocks"]
    if len(down) != len(up):
        side, other = ("down_blocks", "up_blocks") if len(down) < len(up) else ("up_blocks", "down_blocks")
        alone = next(f"{side}.{i}" for i in range(len(net.down_blocks)) if _lacks_mirror(i, side, other, net, removed))
        mirror = f"{other}.{len(net.down_blocks) - 1 - int(alone.split('.')[1])}"
        raise UserError(
            f"Pattern {removed[alone]!r} removes the level {alone} but not its mirror, to which its skip connections "
            f"lead: remove {mirror} too"
        )
    if not down:
        raise UserError("The plan removes every level: keep at least down_blocks.0 and the last of up_blocks")
    for d, u in zip(down, reversed(up), strict=True):
        if len(u.layers) != len(d.layers) + 1:
            where = f"up_blocks.{u.index}" if len(u.layers) > len(d.layers) + 1 else f"down_blocks.{d.index}"
            raise UserError(
                f"Uneven levels: down_blocks.{d.index} keeps {len(d.layers)} resnets, so its mirror "
                f"up_blocks.{u.index} must keep {len(d.layers) + 1} (one skip each), not {len(u.layers)}: remove more "
                f"from {where}"
            )
    return down, up


def _mid_type(net: Any, removed: Mapping[str, str]) -> tuple[str | None, list[int], tuple[int, ...]]:
    """Returns diffusers' type of the student's mid block, and the resnets and transformer blocks that stay in it."""
    mid = net.mid_block
    if mid is None or "mid_block" in removed:
        return None, [], ()
    resnets = [j for j in range(len(mid.resnets)) if f"mid_block.resnets.{j}" not in removed]
    attentions = [
        j
        for j, module in enumerate(mid.attentions)
        if module is not None and f"mid_block.attentions.{j}" not in removed
    ]
    if len(resnets) == 2 and len(attentions) == 1:
        blocks = _blocks(mid.attentions[0], "mid_block.attentions.0", removed)
        return "UNetMidBlock2DCrossAttn", resnets, blocks
    if len(resnets) == 1 and not attentions:
        return "UNetMidBlock2D", resnets, ()
    part = next(name for name in removed if name.startswith("mid_block."))
    raise UserError(
        f"Pattern {removed[part]!r} leaves a mid block with {len(resnets)} resnets and {len(attentions)} attentions, "
        "which diffusers has no form for: remove mid_block, or nothing of it, or its attention and one of its resnets"
    )


def _depths(level: UNetLevel, nested: bool) -> int | list[int]:
    counts = [len(layer.blocks) for layer in level.layers if layer.blocks is not None]
    if not counts:
        return 1
    return counts if nested or len(set(counts)) > 1 else counts[0]


def _transformer_fields(
    config: Config, down: list[UNetLevel], up: list[UNetLevel], mid_blocks: tuple[int, ...]
) -> Config:
    """Returns `transformer_layers_per_block` and its reverse, in the shortest form that diffusers reads correctly.

    diffusers takes the mid block's depth from the last down entry, and the up depths from the reversed list unless
    they are given.
    """
    rows = [_depths(level, nested=False) for level in down]
    up_rows = [_depths(level, nested=False) for level in up]
    if mid_blocks and not down[-1].has_attention:
        rows[-1] = len(mid_blocks)
    if mid_blocks and (rows[-1][0] if isinstance(rows[-1], list) else rows[-1]) != len(mid_blocks):
        raise UserError(
            f"The plan leaves {len(mid_blocks)} transformer blocks in mid_block.attentions.0 and {rows[-1]} in "
            f"down_blocks.{down[-1].index}; diffusers has one number for both: remove equally many from each"
        )
    symmetric = not any(isinstance(row, list) for row in rows) and all(
        a == b for a, b, level in zip(rows, reversed(up_rows), reversed(up), strict=True) if level.has_attention
    )
    if symmetric:
        plain = len(set(map(str, rows))) == 1
        keep_list = isinstance(config.get("transformer_layers_per_block"), list | tuple)
        return {
            "transformer_layers_per_block": rows[0] if plain and not keep_list else rows,
            "reverse_transformer_layers_per_block": None,
        }
    lists = [_depths(level, nested=level.has_attention) for level in down]
    if mid_blocks and not down[-1].has_attention:
        lists[-1] = len(mid_blocks)
    return {
        "transformer_layers_per_block": lists,
        "reverse_transformer_layers_per_block": [_depths(level, nested=level.has_attention) for level in up],
    }


def _level_type(name: str, level: UNetLevel) -> str:
    return name if level.has_attention else name.replace("CrossAttn", "")


def student_config(config: Mapping[str, Any], net: Any, removed: Mapping[str, str]) -> Config:
    """Returns the stock diffusers config of `net` without the parts `removed`; an empty plan gives the teacher's."""
    full: Config = dict(config)
    if not removed:
        return full
    down, up = kept_levels(net, removed)
    mid_type, _, mid_blocks = _mid_type(net, removed)
    out = dict(full)
    out["down_block_types"] = [_level_type(full["down_block_types"][s.index], s) for s in down]
    out["up_block_types"] = [_level_type(full["up_block_types"][s.index], s) for s in up]
    out["block_out_channels"] = [full["block_out_channels"][s.index] for s in down]
    layers = [len(s.layers) for s in down]
    out["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    for field in PER_LEVEL_FIELDS:
        if isinstance(full.get(field), list | tuple):
            out[field] = [full[field][s.index] for s in down]
    out["mid_block_type"] = mid_type
    fields = _transformer_fields(full, down, up, mid_blocks)
    out.update({k: v for k, v in fields.items() if k in full or v not in (1, None)})
    return out


def module_map(net: Any, removed: Mapping[str, str]) -> dict[str, str]:
    """Maps student modules to teacher modules, by prefixes of their names; the longest prefix counts."""
    down, up = kept_levels(net, removed)
    mapping: dict[str, str] = {}
    for side, levels in (("down_blocks", down), ("up_blocks", up)):
        for i, level in enumerate(levels):
            student, teacher = f"{side}.{i}", f"{side}.{level.index}"
            mapping[student] = teacher
            for j, layer in enumerate(level.layers):
                mapping[f"{student}.resnets.{j}"] = f"{teacher}.resnets.{layer.resnet}"
                mapping[f"{student}.attentions.{j}"] = f"{teacher}.attentions.{layer.resnet}"
                for b, block in enumerate(layer.blocks or ()):
                    mapping[f"{student}.attentions.{j}.transformer_blocks.{b}"] = (
                        f"{teacher}.attentions.{layer.resnet}.transformer_blocks.{block}"
                    )
    _, resnets, blocks = _mid_type(net, removed)
    for j, resnet in enumerate(resnets):
        mapping[f"mid_block.resnets.{j}"] = f"mid_block.resnets.{resnet}"
    for b, block in enumerate(blocks):
        mapping[f"mid_block.attentions.0.transformer_blocks.{b}"] = f"mid_block.attentions.0.transformer_blocks.{block}"
    return mapping
