"""Where a student works: the programs that load it, and the additions to its teacher that still fit it.

All of it follows from the plan. Each answer begins with "yes", or with "no:" and says why and what helps.
"""

from collections.abc import Mapping
from typing import Any

from prunet.denoisers.form import teacher_name
from prunet.denoisers.unet2d.controlnet import residual_names, residuals, without_form

CPP = "stable-diffusion.cpp, single file"
ADAPT = "`prunet adapt FILE --to RUN`"

# ComfyUI recognises an SDXL-shaped checkpoint by the transformer depth of each down resnet (its
# `supported_models.py`: SDXL, SSD1B, Segmind_Vega, KOALA_1B, KOALA_700M); SD v1 and v2 by their widths alone.
_COMFY_SDXL_DEPTHS = ([0, 0, 2, 2, 10, 10], [0, 0, 2, 2, 4, 4], [0, 0, 1, 1, 2, 2], [0, 2, 5], [0, 2, 6])
# stable-diffusion.cpp builds one of these, by a few names in the file: the depths of the down, mid and up layers.
_CPP_FORMS: tuple[tuple[list[int], list[int], list[int]], ...] = (
    ([1, 1, 1, 1, 1, 1, 0, 0], [1, 0], [0, 0, 0, *[1] * 9]),  # SD v1 and v2
    ([0, 0, 2, 2, 10, 10], [10, 0], [10, 10, 10, 2, 2, 2, 0, 0, 0]),
    ([0, 0, 2, 2, 4, 4], [0], [4, 4, 10, 2, 1, 1, 0, 0, 0]),  # SSD-1B
    ([0, 0, 1, 1, 2, 2], [0], [2, 2, 2, 1, 1, 1, 0, 0, 0]),  # Vega
)
#: Of SD v1 and v2, and it counts its layers in a way of its own (`ldm_names.ldm_modules`).
_CPP_TINY = ([1, 1, 1], [], [1, 1, 1, 1, 1, 1])  # type: tuple[list[int], list[int], list[int]]  # bk-tiny


def loads_in(student: Mapping[str, Any], net: Any) -> dict[str, str]:
    """Program -> "yes", with the option of `prunet export` that it takes, or why not, of a config and its skeleton.

    diffusers is always "yes": a plan without a stock form was refused.
    """
    depths = _depths(net.down_blocks)
    form = depths, _depths([net.mid_block] if net.mid_block else []), _depths(net.up_blocks)
    comfy = cpp = "yes"
    if student["block_out_channels"][0] != 320 or student.get("cross_attention_dim") not in (768, 1024, 2048):
        comfy = cpp = "no: not the widths of SD v1, v2 or SDXL"
    else:
        if not any(depths):
            comfy = "no: it knows a checkpoint by an attention on the way down"
        elif student["cross_attention_dim"] == 2048 and depths not in _COMFY_SDXL_DEPTHS:
            comfy = f"no: it knows SDXL students by their down depths, and {depths} is none that it knows"
        if form == _CPP_TINY and student["cross_attention_dim"] < 2048:
            cpp = "yes: with --for sd.cpp"
        elif form not in _CPP_FORMS:
            cpp = "no: it knows the whole SD v1, v2 and SDXL, bk-tiny, SSD-1B and Vega"
    uneven = isinstance(student["layers_per_block"], list)
    return {
        "diffusers": "yes",
        "diffusers, single file": "no: its reader needs the same number of layers in every level" if uneven else "yes",
        "ComfyUI, single file": comfy,
        CPP: cpp,
    }


def works_with(whole: Any, net: Any, mapping: Mapping[str, str]) -> dict[str, str]:
    """What was made for the teacher, or for models of its kind -> "yes" or why not.

    Args:
        whole, net: the skeletons of teacher and student.
        mapping: student module -> teacher module.
    """
    mid_attention = bool(getattr(net.mid_block, "attentions", None))
    same_layers = [len(b.resnets) for b in net.down_blocks] == [len(b.resnets) for b in whole.down_blocks]
    places, formless = residuals(whole, net, mapping), without_form(net)
    fits = places.mid and places.down == tuple(range(len(residual_names(whole))))
    return {
        "the teacher's LoRA": _lora(whole, net, mapping),
        "the teacher's ControlNet": "yes"
        if fits
        else f"no: it adds to layers that are gone (a size error); {ADAPT} gives a folder that does",
        "a ControlNet of its own": f"no: {formless}" if formless else "yes",
        "the teacher's IP-Adapter": _ip_adapter(whole, net, mapping),
        "the teacher's AnimateDiff": "yes"
        if same_layers and mid_attention
        else "no: it needs each level's layers and the attention of the mid block",
        "PAG's default layer": "yes"
        if mid_attention
        else "no: that is the attention of the mid block; name others (pag_applied_layers)",
    }


def _depths(blocks: Any) -> list[int]:
    """Transformer blocks beside each resnet, in order; 0: no attention there."""
    return [
        len(block.attentions[j].transformer_blocks)
        if j < len(getattr(block, "attentions", None) or ()) and block.attentions[j] is not None
        else 0
        for block in blocks
        for j in range(len(block.resnets))
    ]


def _lora(whole: Any, net: Any, mapping: Mapping[str, str]) -> str:
    """A LoRA goes by names: a student's layer that has the name of another one of the teacher gets that one's delta."""
    there = {name for name, _ in whole.named_modules()}
    layers = [n for n, _ in net.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    wrong = [name for name in layers if name in there and teacher_name(name, mapping) != name]
    if not wrong:
        return "yes"
    return (
        f"no: {len(wrong)} of {len(layers)} attention layers would get another layer's delta, without an error; "
        f"{ADAPT} carries it over"
    )


def _ip_adapter(whole: Any, net: Any, mapping: Mapping[str, str]) -> str:
    """An IP-Adapter counts the cross-attentions, in this order."""
    theirs, ours = ([name for name in model.attn_processors if ".attn2." in name] for model in (whole, net))
    moved = sum(teacher_name(name, mapping) != theirs[i] for i, name in enumerate(ours))
    if not moved:
        return "yes"
    return (
        f"no: it goes by the order of the cross-attentions; {moved} of {len(ours)} get another one's or an error; "
        f"{ADAPT} carries it over"
    )
