"""The ControlNets of transformers: which residuals of the teacher's each block of the student takes."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.form import Form
from prunet.errors import UserError

#: (config of the ControlNet, its residuals, the teacher's blocks) -> for each block the place of its residual.
Spread = Callable[[Mapping[str, Any], int, int], list[int]]
#: A ControlNet has as many of these as its transformer.
SHARED = ("num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim")


def runs(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Returns equal runs of blocks with one residual each, the last run shorter (Flux, Qwen-Image)."""
    return [block // math.ceil(blocks / residuals) for block in range(blocks)]


def turns(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Returns runs; for a ControlNet that encodes its picture itself, the residuals in turn (Flux, XLabs' form)."""
    if config.get("conditioning_embedding_channels") is None:
        return runs(config, residuals, blocks)
    return [block % residuals for block in range(blocks)]


def shares(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Returns runs of nearly the same length (Stable Diffusion 3)."""
    return [int(block / (blocks / residuals)) for block in range(blocks)]


class BlockControlNets(AdapterForms):
    """LoRA and ControlNet of a class whose ControlNets spread their residuals over lists of blocks.

    Args:
        controlnet: diffusers' name of the class of ControlNets.
        fields: field of its output -> list of the transformer's blocks, config field with its number, how it is spread.
    """

    controlnet_loader = Path(__file__).parent / "student_controlnet.py"

    def __init__(self, controlnet: str, fields: Mapping[str, tuple[str, str, Spread]]) -> None:
        self.controlnet, self._fields = controlnet, fields

    @override
    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        import diffusers

        for field in SHARED:
            if config.get(field, teacher.config[field]) != teacher.config[field]:
                raise UserError(
                    f"a ControlNet of another model: {field} is {config[field]} there, {teacher.config[field]} in the "
                    "teacher: give one that was made for the student's teacher"
                )
        try:
            with torch.device("meta"):
                fields = {key: value for key, value in config.items() if not key.startswith("_")}
                return getattr(diffusers, str(self.controlnet))(**fields)
        except Exception as error:  # of any kind: diffusers takes the values as they are
            raise UserError(f"its config makes no ControlNet ({error}): fetch or copy it again") from error

    @override
    def residuals(self, control: Any, teacher: Any, student: Any, form: Form) -> dict[str, Any]:
        """The residual of a removed block goes to the kept block before it (in front, to the first kept one)."""
        found = {}
        for output, (name, count, spread) in self._fields.items():
            kept = [
                int(theirs.rpartition(".")[2]) for theirs in form.module_map.values() if theirs.startswith(f"{name}.")
            ]
            places: list[list[int]] = [[] for _ in kept]
            number = control.config[count]
            for block, place in (
                enumerate(spread(control.config, number, len(teacher.get_submodule(name)))) if number else ()
            ):
                places[max(sum(other <= block for other in kept) - 1, 0)].append(place)
            found[output] = places
        return {"class": self.controlnet, "residuals": found}
