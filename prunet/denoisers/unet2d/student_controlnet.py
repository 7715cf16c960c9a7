"""The teacher's ControlNet for a student that has no stock ControlNet.

It returns only the residuals that the student has a place for; the file adapted.json beside it lists them. It needs
only diffusers:

    from student_controlnet import StudentControlNet
    control = StudentControlNet.from_pretrained(FOLDER)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(STUDENT, controlnet=control)
"""

import json
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput


class StudentControlNet(ControlNetModel):  # type: ignore[misc]
    """A ControlNet that leaves out residuals; `residuals` are the numbers of those that stay, in order."""

    residuals: list[int]
    mid_residual: bool

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "StudentControlNet":
        """Loads the ControlNet, and the list of residuals that stay."""
        net = super().from_pretrained(folder, **options)
        said = json.loads((Path(folder) / "adapted.json").read_text(encoding="utf-8"))
        net.residuals, net.mid_residual = said["residuals"], said["mid_residual"]
        return net  # type: ignore[no-any-return]

    def forward(self, *args: Any, return_dict: bool = True, **options: Any) -> Any:
        """Returns the residuals that the student has places for."""
        down, mid = super().forward(*args, return_dict=False, **options)
        down = tuple(down[place] for place in self.residuals)
        if not self.mid_residual:  # diffusers always adds a mid residual
            mid = mid.new_zeros(mid.shape[0], 1, 1, 1)
        return ControlNetOutput(down, mid) if return_dict else (down, mid)
