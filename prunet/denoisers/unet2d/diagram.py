"""The U-Net as a diagram: each down level beside its mirrored up level, the mid block below."""

from collections.abc import Iterable
from typing import Any

from prunet.denoisers.diagram import Diagram, Part, Row, Section
from prunet.denoisers.patterns import is_within


def unet_diagram(net: Any, gone: Iterable[str]) -> Diagram:
    """Returns the diagram of the skeleton `net`, with the parts `gone` marked as removed."""
    away, count, widths = set(gone), len(net.down_blocks), net.config["block_out_channels"]
    rows = [
        Row(widths[i], (_section(f"down_blocks.{i}", net, away), _section(f"up_blocks.{count - 1 - i}", net, away)))
        for i in range(count)
    ]
    if net.mid_block is not None:
        rows.append(Row(widths[-1], (_section("mid_block", net, away),)))
    return Diagram(tuple(rows))


def _section(name: str, net: Any, gone: set[str]) -> Section:
    block = net.get_submodule(name)
    attentions = getattr(block, "attentions", None) or []
    layers = []
    for j, resnet in enumerate(block.resnets):
        layer = [_part("resnet", f"{name}.resnets.{j}", resnet, gone)]
        # The mid block has one attention less than resnets; elsewhere every resnet may have an attention after it.
        if j < len(attentions) and attentions[j] is not None:
            layer.append(_part("attention", f"{name}.attentions.{j}", attentions[j], gone))
        layers.append(tuple(layer))
    layers += [
        (_part(kind, f"{name}.{kind}s.0", getattr(block, f"{kind}s"), gone),)
        for kind in ("downsampler", "upsampler")
        if getattr(block, f"{kind}s", None) is not None
    ]
    sizes = {n: p.numel() for n, p in block.named_parameters(prefix=name)}
    kept = sum(size for n, size in sizes.items() if not is_within(n, gone))
    return Section(name, is_within(name, gone), tuple(layers), sum(sizes.values()), kept)


def _part(kind: str, name: str, module: Any, gone: set[str]) -> Part:
    depth = len(getattr(module, "transformer_blocks", []))
    stays = tuple(not is_within(f"{name}.transformer_blocks.{b}", gone) for b in range(depth))
    return Part(kind, name, is_within(name, gone), sum(p.numel() for p in module.parameters()), stays)
