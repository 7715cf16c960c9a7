"""The denoisers that prunet knows."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from prunet.denoisers.architecture import Architecture, Net, config_of
from prunet.denoisers.blocks import inputs
from prunet.denoisers.blocks.adapters import BlockControlNets, runs, shares, turns
from prunet.denoisers.blocks.architecture import Blocks, Stays
from prunet.denoisers.unet2d.architecture import UNET2D
from prunet.errors import UserError

_DOUBLES_AND_SINGLES = {
    "num_layers": ("transformer_blocks",),
    "num_single_layers": ("single_transformer_blocks",),
}
_REFINERS = ("noise_refiner", "context_refiner")

ARCHITECTURES: tuple[Architecture, ...] = (
    UNET2D,
    Blocks(
        "FluxTransformer2DModel",
        _DOUBLES_AND_SINGLES,
        inputs.flux,
        packs=2,
        adapters=BlockControlNets(
            "FluxControlNetModel",
            {
                "controlnet_block_samples": ("transformer_blocks", "num_layers", turns),
                "controlnet_single_block_samples": ("single_transformer_blocks", "num_single_layers", runs),
            },
        ),
    ),
    Blocks("Flux2Transformer2DModel", _DOUBLES_AND_SINGLES, inputs.flux, packs=2),
    Blocks(
        "SD3Transformer2DModel",
        {"num_layers": ("transformer_blocks",)},
        inputs.sd3,
        numbers="dual_attention_layers",
        stays=Stays(lambda config, count: (count - 1,), ", except the last one, which has another form"),
        adapters=BlockControlNets(
            "SD3ControlNetModel", {"controlnet_block_samples": ("transformer_blocks", "num_layers", shares)}
        ),
    ),
    Blocks(
        "QwenImageTransformer2DModel",
        {"num_layers": ("transformer_blocks",)},
        inputs.qwen_image,
        packs=2,
        adapters=BlockControlNets(
            "QwenImageControlNetModel", {"controlnet_block_samples": ("transformer_blocks", "num_layers", runs)}
        ),
    ),
    Blocks(
        "ZImageTransformer2DModel",
        {"n_layers": ("layers",), "n_refiner_layers": (*_REFINERS, "siglip_refiner")},
        inputs.z_image,
        packs=2,
    ),
    Blocks("SanaTransformer2DModel", {"num_layers": ("transformer_blocks",)}, inputs.sana),
    Blocks("PixArtTransformer2DModel", {"num_layers": ("transformer_blocks",)}, inputs.pixart),
    Blocks("Lumina2Transformer2DModel", {"num_layers": ("layers",), "num_refiner_layers": _REFINERS}, inputs.lumina2),
    Blocks(
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": ("joint_transformer_blocks",), "num_single_dit_layers": ("single_transformer_blocks",)},
        inputs.auraflow,
    ),
    Blocks("CogView4Transformer2DModel", {"num_layers": ("transformer_blocks",)}, inputs.cogview4),
    Blocks("WanTransformer3DModel", {"num_layers": ("blocks",)}, inputs.wan, size=inputs.WAN_SIZE),
    Blocks(
        "WanVACETransformer3DModel",
        {"num_layers": ("blocks",)},
        inputs.wan,
        size=inputs.WAN_SIZE,
        numbers="vace_layers",
        stays=Stays(
            lambda config, count: config["vace_layers"], ", except those in vace_layers, which its control adds to"
        ),
    ),
)
#: Classes that look like lists of blocks but cannot lose any, and the reason.
REFUSED = {
    "HunyuanDiT2DModel": "skip connections join its first and its last blocks by their numbers",
    "ChromaTransformer2DModel": "the modulation of a block is found by the block's number",
    "BriaFiboTransformer2DModel": "each of its blocks reads the text encoder's layer of the same number",
    "HiDreamImageTransformer2DModel": "each of its blocks reads the text encoder's layer of the same number",
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture of a denoiser's config, by its class name; old configs without one are U-Nets.

    Raises:
        UserError: prunet cannot remove blocks of this class.
    """
    name = config.get("_class_name", UNET2D.class_name)
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single":
        name = "PixArtTransformer2DModel"  # the name in configs of diffusers before 0.28
    for architecture in ARCHITECTURES:
        if architecture.class_name == name:
            return architecture
    if name in REFUSED:
        raise UserError(f"The denoiser is a {name}: no block of it can be removed, because {REFUSED[name]}")
    known = ", ".join(architecture.class_name for architecture in ARCHITECTURES)
    raise UserError(f"The denoiser is a {name}, which prunet does not know: give a model with one of {known}")


def fast_attention(net: Net, device: torch.device, *, half: bool) -> AbstractContextManager[None]:
    """Gives a model a faster attention on `device` inside the `with` block, if prunet has one for its class."""
    name = config_of(net)["_class_name"]
    known = next((architecture for architecture in ARCHITECTURES if architecture.class_name == name), None)
    return known.fast_attention([net], device, half=half) if known else nullcontext()
