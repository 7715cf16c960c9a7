"""The ControlNets of transformers, and the residuals that each block of the student takes."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.form import Form
from prunet.errors import UserError

#: Returns for each block the place of its residual, from the ControlNet's config and the numbers of residuals and
#: blocks.
Spread = Callable[[Mapping[str, Any], int, int], list[int]]
#: Fields of the config that a ControlNet shares with its transformer.
SHARED = ("num_attention_heads", "attention_head_dim", "in_channels", "joint_attention_dim")


def runs(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Spreads residuals over equal runs of blocks; the last run may be shorter (Flux, Qwen-Image)."""
    return [block // math.ceil(blocks / residuals) for block in range(blocks)]


def turns(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Spreads residuals over runs, or in turns if the ControlNet encodes its picture itself (Flux, XLabs' form)."""
    if config.get("conditioning_embedding_channels") is None:
        return runs(config, residuals, blocks)
    return [block % residuals for block in range(blocks)]


def shares(config: Mapping[str, Any], residuals: int, blocks: int) -> list[int]:
    """Spreads residuals over runs of nearly the same length (Stable Diffusion 3)."""
    return [int(block / (blocks / residuals)) for block in range(blocks)]


class BlockControlNets(AdapterForms):
    """LoRA and ControlNet of a class whose ControlNets spread their residuals over lists of blocks.

    Args:
        controlnet: diffusers' class of ControlNets.
        fields: for each field of its output: the transformer's list of blocks, the config field with the number of
            residuals, and how they are spread.
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
        except Exception as error:  # any kind of error, since diffusers does not check the values
            raise UserError(f"its config makes no ControlNet ({error}): fetch or copy it again") from error

    @override
    def residuals(self, control: Any, teacher: Any, student: Any, form: Form) -> dict[str, Any]:
        """Gives the residual of a removed block to the kept block before it, or else to the first kept block."""
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
