"""Where a transformer's student works: programs that load it, and additions to its teacher that still fit it."""

import inspect
from collections.abc import Mapping
from typing import Any

#: Classes for which ComfyUI counts the blocks in the file (its `model_detection.py`).
_COUNTED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "PixArtTransformer2DModel")


def loads_in(net: Any) -> dict[str, str]:
    """Maps each program to "yes" or the reason why not, for a student's skeleton; unknown cases are left out."""
    out = {"diffusers": "yes"}
    if type(net).__name__ in _COUNTED:
        out["ComfyUI"] = "yes"
    if type(net).__name__ == "SD3Transformer2DModel":
        depth = len(net.transformer_blocks)
        same = depth == net.inner_dim // 64
        why = f"no: it expects {net.inner_dim // 64} blocks at this width, and the student has {depth}"
        out |= dict.fromkeys(("ComfyUI", "stable-diffusion.cpp"), "yes" if same else why)
    return out


def works_with(whole: Any, mapping: Mapping[str, str], controlnet: str | None) -> dict[str, str]:
    """Maps each addition to the teacher to "yes" or the reason why it does not fit.

    Args:
        whole: the skeleton of the teacher.
        mapping: maps student blocks to teacher blocks.
        controlnet: the class of the ControlNets that `prunet adapt` carries over.
    """
    moved = sum(ours != theirs for ours, theirs in mapping.items())
    takes = inspect.signature(whole.forward).parameters
    why = (
        f"no: {moved} of {len(mapping)} blocks would get another block's delta, without an error; `prunet adapt` "
        "carries it over"
    )
    out = {"the teacher's LoRA": why if moved else "yes"}
    first = next(iter(mapping)).rpartition(".")[0]
    same = sum(name.startswith(f"{first}.") for name in mapping) == len(whole.get_submodule(first))
    if any("controlnet" in name for name in takes):
        why = "no: its residuals are spread evenly over the blocks, so they would meet other blocks"
        why += "; `prunet adapt` carries it over" if controlnet else ""
        out["the teacher's ControlNet"] = "yes" if same else why
    if "skip_layers" in takes:
        out["skip-layer guidance"] = "no: it names blocks by number, and the numbers changed" if moved else "yes"
    return out
