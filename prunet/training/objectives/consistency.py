"""Consistency distillation in latents (LCM, arXiv 2310.04378, algorithm 1).

The student learns to predict the same clean picture at both ends of one step of the teacher's guided DDIM. It then
predicts the teacher's picture also from pure noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.recipe.stage import Stage
from prunet.teacher.teacher import Teacher
from prunet.training.objectives.guidance import Guidance
from prunet.training.objectives.trajectory import in_full

SOLVER_STEPS = 50  # steps of the teacher's DDIM; the `original_inference_steps` of diffusers' LCMScheduler
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # constants of the boundary condition, as in LCMScheduler
HUBER = 0.001


class Consistency(Guidance):
    """The pseudo-Huber distance of the student's clean pictures at both ends of a step of the teacher.

    The target is the student itself without gradient, as in LCM-LoRA's scripts, not an average of its weights.
    """

    def __init__(self, teacher: Teacher, student: Net, stage: Stage, empty: Condition) -> None:
        super().__init__(teacher, student, (), stage, empty)
        self._last = student.get_submodule(teacher.architecture.last_layer)
        self.names = ("consistency",)

    @contextmanager
    def running(self) -> Iterator[None]:
        with super().running(), in_full(self._last):
            yield

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        process, condition = self._process, batch["condition"]
        skip = process.num_timesteps // SOLVER_STEPS
        # All timesteps of the solver are equally likely, because all timesteps are.
        timestep = (batch["timestep"] * SOLVER_STEPS // process.num_timesteps + 1) * skip - 1
        before = (timestep - skip).clamp(min=0)
        noisy = process.add_noise(batch["latents"], batch["noise"], timestep)
        with torch.no_grad():
            theirs = process.clean(noisy, self._taught(noisy, timestep, condition).float(), timestep)
            target = self._seen(model, process.landed(noisy, theirs, timestep, before), before, condition)
        apart = self._seen(model, noisy, timestep, condition) - target
        loss = ((apart.square() + HUBER**2).sqrt() - HUBER).mean()
        return loss, loss.detach()[None]

    def _seen(self, model: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the student's clean picture (B, C, h, w); at timestep 0 it is `noisy` (boundary condition)."""
        output = self._teacher.architecture.call(model, noisy, timestep, condition).float()
        scaled = TIMESTEP_SCALING * timestep.view(-1, 1, 1, 1)
        kept = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
        clean = self._process.clean(noisy, output, timestep)
        return kept * noisy + scaled / (scaled.square() + SIGMA_DATA**2).sqrt() * clean

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["consistency"]}
