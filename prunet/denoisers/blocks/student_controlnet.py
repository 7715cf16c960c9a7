"""The teacher's ControlNet for a student with fewer blocks.

Each block gets the residuals of its block in the teacher and of the removed blocks after it; the file adapted.json
beside this one lists them. It needs only diffusers:

    from student_controlnet import StudentControlNet
    control = StudentControlNet.from_pretrained(FOLDER)
    pipe = FluxControlNetPipeline.from_pretrained(STUDENT, controlnet=control)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch


class StudentControlNet:
    """A ControlNet that returns one sum of residuals for each block of the student.

    `residuals`: for each field of its output, and each block of the student, the places of the residuals to sum.
    """

    residuals: dict[str, list[list[int]]]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Loads the ControlNet, which is also an instance of its class in diffusers, and the list of its residuals."""
        said = json.loads((Path(folder) / "adapted.json").read_text(encoding="utf-8"))
        net = getattr(diffusers, said["class"]).from_pretrained(folder, **options)
        net.__class__ = type(cls.__name__, (cls, type(net)), {})
        net.residuals = said["residuals"]
        return net

    def forward(self, *args: Any, return_dict: bool = True, **options: Any) -> Any:
        """Returns what diffusers' class returns, with one residual for each block of the student."""
        out = super().forward(*args, return_dict=return_dict, **options)  # type: ignore[misc]
        if return_dict:
            return type(out)(**{name: _sums(out[name], places) for name, places in self.residuals.items()})
        if torch.is_tensor(out[0]):  # QwenImageControlNetModel returns its only list
            return _sums(out, *self.residuals.values())
        return tuple(_sums(given, places) for given, places in zip(out, self.residuals.values(), strict=True))


def _sums(given: Sequence[torch.Tensor] | None, places: list[list[int]]) -> tuple[torch.Tensor, ...] | None:
    if given is None:
        return None
    return tuple(torch.stack([given[place] for place in of]).sum(0) for of in places)
