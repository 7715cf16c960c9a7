"""The U-Net as the page draws it."""

from typing import Any

from prunet.denoisers.unet2d import form as unet
from prunet.report.charts import Row
from prunet.words import many


def draw_unet(plan: Row) -> dict[str, Any]:
    """Its stages in rows, each down stage beside its mirrored up stage; the mid stage; and how many parts stay."""
    config = plan["teacher_config"]
    net, gone = unet.skeleton(config), set(plan["removed"]) | set(plan["implied"])
    count, widths = len(net.down_blocks), config["block_out_channels"]
    down = [_stage(f"down_blocks.{i}", net, gone) for i in range(count)]
    up = [_stage(f"up_blocks.{i}", net, gone) for i in range(count)]
    mid = _stage("mid_block", net, gone) if net.mid_block is not None else None
    stages = [*down, *up, *([mid] if mid else [])]
    parts = [part for stage in stages for layer in stage["layers"] for part in layer]
    stays = {kind: [not p["gone"] for p in parts if p["kind"] == kind] for kind in ("resnet", "attention")}
    blocks = [stays for p in parts for stays in p["blocks"]]
    if len(blocks) > len(stays["attention"]):
        stays["transformer block"] = blocks
    return {
        "rows": [{"width": widths[i], "down": down[i], "up": up[-1 - i]} for i in range(count)],
        "mid": mid,
        "mid_width": widths[-1],
        "largest": max(stage["parameters"] for stage in stages),
        "tally": {kind: (sum(which), len(which)) for kind, which in stays.items() if which},
    }


def _is_gone(name: str, gone: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in gone for end in range(1, len(parts) + 1))


def _stage(name: str, net: Any, gone: set[str]) -> dict[str, Any]:
    block = net.get_submodule(name)
    attentions = getattr(block, "attentions", None) or []
    layers = []
    for j, resnet in enumerate(block.resnets):
        layer = [_part("resnet", f"{name}.resnets.{j}", resnet, gone)]
        # The mid stage has one attention less than resnets; in the others every resnet may have one behind it.
        if j < len(attentions) and attentions[j] is not None:
            layer.append(_part("attention", f"{name}.attentions.{j}", attentions[j], gone))
        layers.append(layer)
    for kind in ("downsampler", "upsampler"):
        if getattr(block, f"{kind}s", None) is not None:
            layers.append([_part(kind, f"{name}.{kind}s.0", getattr(block, f"{kind}s"), gone)])
    sizes = {n: p.numel() for n, p in block.named_parameters(prefix=name)}
    kept = sum(size for n, size in sizes.items() if not _is_gone(n, gone))
    facts = {"parameters": sum(sizes.values()), "kept": kept}
    return {"name": name, "gone": _is_gone(name, gone), "layers": layers, **facts}


def _part(kind: str, name: str, module: Any, gone: set[str]) -> dict[str, Any]:
    """A resnet, attention or sampler; `blocks` says of each transformer block in it whether it stays."""
    is_gone = _is_gone(name, gone)
    depth = len(getattr(module, "transformer_blocks", []))
    blocks = [not _is_gone(f"{name}.transformer_blocks.{b}", gone) for b in range(depth)]
    title = f"{name}: {many(sum(p.numel() for p in module.parameters()))} parameters, "
    title += "removed" if is_gone else "kept" if all(blocks) else f"{sum(blocks)} of {depth} transformer blocks kept"
    return {"kind": kind, "name": name, "gone": is_gone, "blocks": blocks, "title": title}
