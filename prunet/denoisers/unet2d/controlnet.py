"""The residuals of a teacher's ControlNet, the places that a student has for them, and a ControlNet cut by a plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prunet.denoisers.form import teacher_name
from prunet.denoisers.unet2d.guidance import takes_guidance
from prunet.errors import UserError

#: Fields of a ControlNet's config about its U-Net's form.
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
    """Lists the modules on the way down whose outputs get a residual of a ControlNet, in the order of the residuals."""
    names = ["conv_in"]
    for i, block in enumerate(net.down_blocks):
        names += [f"down_blocks.{i}.resnets.{j}" for j in range(len(block.resnets))]
        names += [f"down_blocks.{i}.downsamplers.{j}" for j in range(len(block.downsamplers or ()))]
    return names


def residuals(whole: Any, net: Any, mapping: Mapping[str, str]) -> Residuals:
    """Returns the residuals of the teacher's ControlNet that the student has a place for.

    `whole`, `net`: the skeletons of teacher and student; `mapping` maps student modules to teacher modules. Without a
    mid block, diffusers adds the mid residual to the output of the last down level. The mid residual has a place there
    if this level is also the teacher's last.
    """
    theirs = residual_names(whole)
    last = teacher_name(f"down_blocks.{len(net.down_blocks) - 1}", mapping)
    return Residuals(
        tuple(theirs.index(teacher_name(name, mapping)) for name in residual_names(net)),
        last == f"down_blocks.{len(whole.down_blocks) - 1}",
    )


def without_form(net: Any) -> str | None:
    """Returns why diffusers has no ControlNet of a U-Net's form; None if it has one."""
    if net.mid_block is None:
        return "diffusers has no ControlNet without a mid block"
    if isinstance(net.config["layers_per_block"], list | tuple):
        return "diffusers has no ControlNet with different numbers of layers at its levels"
    if takes_guidance(net.config):
        return "diffusers has no ControlNet that takes the guidance scale as an input"
    return None


def empty_controlnet(config: Mapping[str, Any], whole: Any) -> Any:
    """Makes the ControlNet of `config` on the meta device; `whole`: the skeleton of the U-Net that it was made for.

    Raises:
        UserError: diffusers cannot make it; a layer on the way down is missing, or has another shape.
    """
    try:
        control = _make(config)
    except Exception as error:  # any kind of error, since diffusers does not check the values
        raise UserError(f"its config makes no ControlNet ({error}): fetch or copy it again") from error
    ours, shared = control.state_dict(), ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    theirs = {name: tensor for name, tensor in whole.state_dict().items() if name.startswith(shared)}
    for name in (*theirs, *(name for name in ours if name.startswith(shared))):
        here, there = (list(state[name].shape) if name in state else "nothing" for state in (ours, theirs))
        if here != there:
            raise UserError(
                f"a ControlNet of another model: {name} is {here} in it, {there} in the teacher: give a ControlNet of "
                "the student's teacher"
            )
    return control


def _make(config: Mapping[str, Any]) -> Any:
    """Makes a ControlNet on the meta device from the fields of its config: see `form.make_unet`."""
    from diffusers import ControlNetModel  # imported here, because most commands do not need it

    with torch.device("meta"):
        return ControlNetModel(**{key: value for key, value in config.items() if not key.startswith("_")})


def cut_controlnet(control: Any, form: Mapping[str, Any], taken: Residuals, mapping: Mapping[str, str]) -> Any:
    """Cuts `control` by the plan into a stock ControlNet, with its weights in their precision.

    `form`: the student's config; `without_form` must return None for it.
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
