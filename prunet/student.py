"""The student: a stock denoiser made from a plan, with the weights that it inherits from the teacher."""

import hashlib

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prunet import unet
from prunet.plan import Derived, Plan, derive
from prunet.teacher import Teacher


def build(teacher: Teacher, plan: Plan) -> UNet2DConditionModel:
    """A stock `UNet2DConditionModel` of what the plan leaves, in fp32, its weights copied from the teacher.

    The teacher is not changed. An empty plan gives a copy that computes the same bits.

    Raises:
        UserError: the plan does not fit the teacher (see `prunet.plan.derive`).
    """
    return inherit(teacher.unet, derive(teacher.unet_config, plan))


def inherit(source: nn.Module, derived: Derived) -> UNet2DConditionModel:
    """The student of `derived` with weights copied from `source`, the teacher's denoiser.

    Made on the meta device and filled by assignment, so no time goes into random weights.
    """
    weights: dict[str, Tensor] = source.state_dict()
    with torch.device("meta"):
        student = unet.make_unet(derived.student_config)
    student.load_state_dict(
        {
            name: weights[origin].detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, origin in derived.weight_map.items()
        },
        assign=True,
    )
    return student.eval().requires_grad_(False)


def state_hash(module: nn.Module) -> str:
    """A hash of every parameter and buffer, bit for bit, with names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
