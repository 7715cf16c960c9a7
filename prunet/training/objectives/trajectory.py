"""Trajectory regression: one step of the student lands where several guided steps of its teacher landed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunet.denoisers.architecture import Net
from prunet.teacher.teacher import Teacher
from prunet.training.losses import mse
from prunet.training.objectives.objective import Objective
from prunet.training.session import Session


class Trajectory(Objective):
    """The squared error of the clean picture that the student predicts before a jump.

    The target is the clean picture with which a step of DDIM lands on the teacher's path. The weight is the
    signal-to-noise ratio before the jump, at least 1. The objective calls no teacher: its paths lie in a cache
    (`prunet.data.paths`).
    """

    names = ("jump",)

    def __init__(self, teacher: Teacher, student: Net) -> None:
        self._call, self._process = teacher.architecture.call, teacher.process
        self._last = student.get_submodule(teacher.architecture.last_layer)

    def start(self, session: Session) -> None:
        self._process = self._process.to(session.device)

    def running(self) -> AbstractContextManager[None]:
        return in_full(self._last)

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        noisy, landed, timestep, after = (batch[k] for k in ("noisy", "landed", "timestep", "after"))
        ours = self._call(model, noisy, timestep, batch["condition"])
        clean = self._process.clean(noisy, ours.float(), timestep)
        target = self._process.clean_between(noisy, landed, timestep, after)
        loss = mse(clean, target, self._process.snr(timestep).clamp(min=1))
        return loss, loss.detach()[None]

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["jump"]}


@contextmanager
def in_full(layer: nn.Module) -> Iterator[None]:
    """Lets a layer compute in fp32 under autocast: in pure noise an output's error grows 15 times in the picture."""
    forward = layer.forward

    def exact(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            out: Tensor = forward(features.float())
            return out

    layer.forward = exact
    try:
        yield
    finally:
        del layer.forward
