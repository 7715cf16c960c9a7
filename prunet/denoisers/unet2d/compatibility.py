"""Where a student works: the programs that load it, and the additions to its teacher that still fit it.

Everything follows from the plan. An answer is "yes", or "no:" with the reason and what helps.
"""

from collections.abc import Mapping
from typing import Any

from prunet.denoisers.architecture import ATTENTION_LAYERS
from prunet.denoisers.form import teacher_name
from prunet.denoisers.unet2d.controlnet import residual_names, residuals, without_form
from prunet.denoisers.unet2d.guidance import takes_guidance

CPP = "stable-diffusion.cpp, single file"
ADAPT = "`prunet adapt FILE --to RUN`"

# ComfyUI recognises an SDXL-shaped checkpoint by the transformer depth of each down resnet (its
# `supported_models.py`: SDXL, SSD1B, Segmind_Vega, KOALA_1B, KOALA_700M); SD v1 and v2 by their widths alone.
_COMFY_SDXL_DEPTHS = ([0, 0, 2, 2, 10, 10], [0, 0, 2, 2, 4, 4], [0, 0, 1, 1, 2, 2], [0, 2, 5], [0, 2, 6])
# stable-diffusion.cpp recognises these by a few names in the file: the depths of the down, mid and up layers.
_CPP_FORMS: tuple[tuple[list[int], list[int], list[int]], ...] = (
    ([1, 1, 1, 1, 1, 1, 0, 0], [1, 0], [0, 0, 0, *[1] * 9]),  # SD v1 and v2
    ([0, 0, 2, 2, 10, 10], [10, 0], [10, 10, 10, 2, 2, 2, 0, 0, 0]),
    ([0, 0, 2, 2, 4, 4], [0], [4, 4, 10, 2, 1, 1, 0, 0, 0]),  # SSD-1B
    ([0, 0, 1, 1, 2, 2], [0], [2, 2, 2, 1, 1, 1, 0, 0, 0]),  # Vega
)
#: The form of bk-tiny (SD v1 and v2); stable-diffusion.cpp numbers its layers differently (`ldm_names.ldm_modules`).
_CPP_TINY = ([1, 1, 1], [], [1, 1, 1, 1, 1, 1])  # type: tuple[list[int], list[int], list[int]]


def loads_in(student: Mapping[str, Any], net: Any) -> dict[str, str]:
    """Maps each program to "yes", with the option of `prunet export` that it needs, or to the reason why not.

    `student`: a config; `net`: its skeleton. diffusers is always "yes", because plans without a stock form are refused.
    """
    depths = _depths(net.down_blocks)
    form = depths, _depths([net.mid_block] if net.mid_block else []), _depths(net.up_blocks)
    comfy = cpp = "yes"
    if student["block_out_channels"][0] != 320 or student.get("cross_attention_dim") not in (768, 1024, 2048):
        comfy = cpp = "no: not the widths of SD v1, v2 or SDXL"
    else:
        if not any(depths):
            comfy = "no: it recognises a checkpoint by an attention on the way down"
        elif student["cross_attention_dim"] == 2048 and depths not in _COMFY_SDXL_DEPTHS:
            comfy = f"no: it recognises SDXL students by their down depths, and does not know {depths}"
        if form == _CPP_TINY and student["cross_attention_dim"] < 2048:
            cpp = "yes: with --for sd.cpp"
        elif form not in _CPP_FORMS:
            cpp = "no: it knows only the whole SD v1, v2 and SDXL, bk-tiny, SSD-1B and Vega"
    one_file = "yes"
    if isinstance(student["layers_per_block"], list):
        one_file = "no: its reader needs the same number of layers in every level"
    if takes_guidance(student):
        one_file = comfy = cpp = "no: the layout has no name for the weights that take the guidance scale"
    return {
        "diffusers": "yes",
        "diffusers, single file": one_file,
        "ComfyUI, single file": comfy,
        CPP: cpp,
    }


def works_with(whole: Any, net: Any, mapping: Mapping[str, str]) -> dict[str, str]:
    """Maps each addition to the teacher, or to models of its kind, to "yes" or to the reason why it does not fit.

    Args:
        whole, net: the skeletons of teacher and student.
        mapping: maps student modules to teacher modules.
    """
    mid_attention = bool(getattr(net.mid_block, "attentions", None))
    same_layers = [len(b.resnets) for b in net.down_blocks] == [len(b.resnets) for b in whole.down_blocks]
    places, formless = residuals(whole, net, mapping), without_form(net)
    fits = places.mid and places.down == tuple(range(len(residual_names(whole))))
    return {
        "the teacher's LoRA": _lora(whole, net, mapping),
        "the teacher's ControlNet": "yes"
        if fits
        else f"no: it adds to layers that are gone (a size error); {ADAPT} gives a folder that fits",
        "a ControlNet of its own": f"no: {formless}" if formless else "yes",
        "the teacher's IP-Adapter": _ip_adapter(whole, net, mapping),
        "the teacher's AnimateDiff": "yes"
        if same_layers and mid_attention
        else "no: it needs each level's layers and the attention of the mid block",
        "PAG's default layer": "yes"
        if mid_attention
        else "no: it is the attention of the mid block; name others (pag_applied_layers)",
    }


def _depths(blocks: Any) -> list[int]:
    """Counts the transformer blocks after each resnet, in order; 0: no attention."""
    return [
        len(block.attentions[j].transformer_blocks)
        if j < len(getattr(block, "attentions", None) or ()) and block.attentions[j] is not None
        else 0
        for block in blocks
        for j in range(len(block.resnets))
    ]


def _lora(whole: Any, net: Any, mapping: Mapping[str, str]) -> str:
    """A LoRA finds layers by name: a student's layer with the name of another layer of the teacher gets its delta."""
    there = {name for name, _ in whole.named_modules()}
    layers = [n for n, _ in net.named_modules() if n.endswith(ATTENTION_LAYERS)]
    wrong = [name for name in layers if name in there and teacher_name(name, mapping) != name]
    if not wrong:
        return "yes"
    return (
        f"no: {len(wrong)} of {len(layers)} attention layers would get another layer's delta, without an error; "
        f"{ADAPT} carries it over"
    )


def _ip_adapter(whole: Any, net: Any, mapping: Mapping[str, str]) -> str:
    """An IP-Adapter numbers the cross-attentions in this order."""
    theirs, ours = ([name for name in model.attn_processors if ".attn2." in name] for model in (whole, net))
    moved = sum(teacher_name(name, mapping) != theirs[i] for i, name in enumerate(ours))
    if not moved:
        return "yes"
    return (
        f"no: it goes by the order of the cross-attentions; {moved} of {len(ours)} get another's weights or an error; "
        f"{ADAPT} carries it over"
    )
