"""The U-Net as a drawing: each down stage beside its mirrored up stage, the mid stage below."""

from collections.abc import Iterable
from typing import Any

from prunet.denoisers.drawing import Drawing, Part, Row, Stage
from prunet.denoisers.patterns import is_within


def draw_unet(net: Any, gone: Iterable[str]) -> Drawing:
    """The skeleton `net` without the parts `gone`."""
    away, count, widths = set(gone), len(net.down_blocks), net.config["block_out_channels"]
    rows = [
        Row(widths[i], (_stage(f"down_blocks.{i}", net, away), _stage(f"up_blocks.{count - 1 - i}", net, away)))
        for i in range(count)
    ]
    if net.mid_block is not None:
        rows.append(Row(widths[-1], (_stage("mid_block", net, away),)))
    return Drawing(tuple(rows))


def _stage(name: str, net: Any, gone: set[str]) -> Stage:
    block = net.get_submodule(name)
    attentions = getattr(block, "attentions", None) or []
    layers = []
    for j, resnet in enumerate(block.resnets):
        layer = [_part("resnet", f"{name}.resnets.{j}", resnet, gone)]
        # The mid stage has one attention less than resnets; in the others every resnet may have one behind it.
        if j < len(attentions) and attentions[j] is not None:
            layer.append(_part("attention", f"{name}.attentions.{j}", attentions[j], gone))
        layers.append(tuple(layer))
    for kind in ("downsampler", "upsampler"):
        if getattr(block, f"{kind}s", None) is not None:
            layers.append((_part(kind, f"{name}.{kind}s.0", getattr(block, f"{kind}s"), gone),))
    sizes = {n: p.numel() for n, p in block.named_parameters(prefix=name)}
    kept = sum(size for n, size in sizes.items() if not is_within(n, gone))
    return Stage(name, is_within(name, gone), tuple(layers), sum(sizes.values()), kept)


def _part(kind: str, name: str, module: Any, gone: set[str]) -> Part:
    depth = len(getattr(module, "transformer_blocks", []))
    stays = tuple(not is_within(f"{name}.transformer_blocks.{b}", gone) for b in range(depth))
    return Part(kind, name, is_within(name, gone), sum(p.numel() for p in module.parameters()), stays)
