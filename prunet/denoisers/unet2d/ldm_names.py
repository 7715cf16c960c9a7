"""The names of a U-Net's modules in the original LDM layout (SGM's for SDXL), which numbers layers across levels."""

from collections.abc import Iterator
from typing import Any

#: Layers of a level of SD v1, resampling included.
LEVEL = 3
#: Names of the modules in a resnet.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_modules(unet: Any, gaps: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (module, LDM module). An LDM layer is a resnet with its attention and upsampler, or a downsampler alone.

    With `gaps`, layers are numbered like in stable-diffusion.cpp: each level begins, and resamples, at its number in
    SD v1.
    """
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        if getattr(unet, ours, None) is not None:
            yield f"{ours}.linear_1", f"{theirs}.0"
            yield f"{ours}.linear_2", f"{theirs}.2"
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    for way, theirs, layer in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for b, block in enumerate(unet.get_submodule(f"{way}_blocks")):
            ours, attended = f"{way}_blocks.{b}", bool(getattr(block, "attentions", None))
            end = layer + LEVEL
            for i in range(len(block.resnets)):
                yield f"{ours}.resnets.{i}", f"{theirs}.{layer}.0"
                if attended:
                    yield f"{ours}.attentions.{i}", f"{theirs}.{layer}.1"
                layer += 1
            if gaps and way == "down":
                layer = end - 1
            if way == "down" and block.downsamplers:
                yield f"{ours}.downsamplers.0.conv", f"{theirs}.{layer}.0.op"
                layer += 1
            if gaps and way == "up" and layer < end:
                layer, attended = end, b > 0  # the upsampler's name in SD v1, where the first level has no attention
            if way == "up" and block.upsamplers:  # part of the level's last layer
                yield f"{ours}.upsamplers.0.conv", f"{theirs}.{layer - 1}.{1 + attended}.conv"
    for kind, first in (("resnets", 0), ("attentions", 1)):  # resnets and attentions alternate
        for i in range(len(getattr(unet.mid_block, kind, ()))):
            yield f"mid_block.{kind}.{i}", f"middle_block.{2 * i + first}"


def ldm_names(unet: Any) -> dict[str, str]:
    """Maps each module with its own weights to its name in the LDM layout."""
    names: dict[str, str] = {}
    for ours, theirs in ldm_modules(unet):
        for inner, module in unet.get_submodule(ours).named_modules():
            if module._parameters:
                target = RESNET.get(inner, inner)
                names[".".join(filter(None, (ours, inner)))] = ".".join(filter(None, (theirs, target)))
    return names
