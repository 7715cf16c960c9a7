"""What a ControlNet of the teacher adds to, what of it a student has a place for, and the ControlNet cut by a plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunet.denoisers.form import teacher_name
from prunet.errors import UserError

#: What a ControlNet is told of its U-Net's form.
FORM_FIELDS = (
    *("down_block_types", "mid_block_type", "block_out_channels", "layers_per_block", "transformer_layers_per_block"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "only_cross_attention"),
)
ZERO_CONVOLUTIONS = "controlnet_down_blocks."


@dataclass(frozen=True)
class Residuals:
    """Which residuals of the teacher's ControlNet a student has a place for."""

    down: tuple[int, ...]  # for each of the student's, in order, the place among the teacher's
    mid: bool


def residual_names(net: Any) -> list[str]:
    """The modules of the way down whose outputs a ControlNet adds to, in the order of its residuals."""
    names = ["conv_in"]
    for i, block in enumerate(net.down_blocks):
        names += [f"down_blocks.{i}.resnets.{j}" for j in range(len(block.resnets))]
        names += [f"down_blocks.{i}.downsamplers.{j}" for j in range(len(block.downsamplers or ()))]
    return names


def residuals(whole: Any, net: Any, mapping: Mapping[str, str]) -> Residuals:
    """`whole`, `net`: the skeletons of teacher and student; `mapping`: student module -> teacher module.

    Without a mid block diffusers adds the mid residual to what leaves the last down level: it has a place there if that
    is the teacher's last.
    """
    theirs = residual_names(whole)
    last = teacher_name(f"down_blocks.{len(net.down_blocks) - 1}", mapping)
    return Residuals(
        tuple(theirs.index(teacher_name(name, mapping)) for name in residual_names(net)),
        last == f"down_blocks.{len(whole.down_blocks) - 1}",
    )


def without_form(net: Any) -> str | None:
    """Why diffusers has no ControlNet of a U-Net's form; None where it has."""
    if net.mid_block is None:
        return "diffusers has no ControlNet without a mid block"
    if isinstance(net.config["layers_per_block"], list | tuple):
        return "diffusers has no ControlNet whose levels have different numbers of layers"
    return None


def empty_controlnet(config: Mapping[str, Any], whole: Any) -> Any:
    """The ControlNet of `config` on the meta device; `whole`: the skeleton of the U-Net that it must be made for.

    Raises:
        UserError: diffusers cannot make it; a layer on the way down is missing, or has another shape.
    """
    try:
        control = _make(config)
    except Exception as error:  # of any kind: diffusers takes the values as they are
        raise UserError(f"its config makes no ControlNet ({error}): fetch or copy it again") from error
    ours, shared = control.state_dict(), ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    theirs = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith(shared)}
    for name in (*theirs, *(name for name in ours if name.startswith(shared))):
        here, there = (list(state[name].shape) if name in state else "nothing" for state in (ours, theirs))
        if here != there:
            raise UserError(
                f"a ControlNet of another model: {name} is {here} there, {there} in the teacher: give one that was "
                "made for the student's teacher"
            )
    return control


def _make(config: Mapping[str, Any]) -> Any:
    """On the meta device, from the fields: see `form.make_unet`."""
    from diffusers import ControlNetModel  # imported when used: most commands need none

    with torch.device("meta"):
        return ControlNetModel(**{key: value for key, value in config.items() if not key.startswith("_")})


def cut_controlnet(control: Any, form: Mapping[str, Any], taken: Residuals, mapping: Mapping[str, str]) -> Any:
    """The stock ControlNet that the plan leaves of `control`, with its weights, in their precision.

    `form`: the student's config, for which `without_form` finds nothing.
    """
    own = dict(control.config)
    small = _make(own | {key: form[key] for key in FORM_FIELDS if key in form and key in own})
    weights = control.state_dict()

    def origin(name: str) -> str:
        if not name.startswith(ZERO_CONVOLUTIONS):
            return teacher_name(name, mapping)
        number, _, rest = name.removeprefix(ZERO_CONVOLUTIONS).partition(".")
        return f"{ZERO_CONVOLUTIONS}{taken.down[int(number)]}.{rest}"

    small.load_state_dict({name: weights[origin(name)] for name in small.state_dict()}, assign=True)
    return small.eval().requires_grad_(False)
