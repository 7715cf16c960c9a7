"""Where a student of a transformer works: programs that load it, and additions to its teacher that still fit it."""

import inspect
from collections.abc import Mapping
from typing import Any

#: Classes of which ComfyUI counts the blocks in the file (its `model_detection.py`).
_COUNTED = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "PixArtTransformer2DModel")


def loads_in(net: Any) -> dict[str, str]:
    """Program -> "yes" or why not, of a student's skeleton; programs of which it is not known are left out."""
    out = {"diffusers": "yes"}
    if type(net).__name__ in _COUNTED:
        out["ComfyUI"] = "yes"
    if type(net).__name__ == "SD3Transformer2DModel":
        depth = len(net.transformer_blocks)
        same = depth == net.inner_dim // 64
        why = f"no: it takes {net.inner_dim // 64} blocks from the width, and this one has {depth}"
        out |= dict.fromkeys(("ComfyUI", "stable-diffusion.cpp"), "yes" if same else why)
    return out


def works_with(whole: Any, mapping: Mapping[str, str], controlnet: str | None) -> dict[str, str]:
    """What was made for the teacher -> "yes" or why not.

    Args:
        whole: the skeleton of the teacher.
        mapping: student block -> teacher block.
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
        why = "no: its residuals are spread over the blocks by their count, so that they would meet others"
        why += "; `prunet adapt` carries it over" if controlnet else ""
        out["the teacher's ControlNet"] = "yes" if same else why
    if "skip_layers" in takes:
        out["skip-layer guidance"] = "no: it names blocks by number; name others" if moved else "yes"
    return out
