"""Distribution matching (DMD2 without its adversarial term, arXiv 2405.14867).

A second network, the fake score, learns what the student draws in its few steps. The student's pictures are moved to
where the guided teacher finds them likelier than the fake score does.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.recipe.stage import Stage
from prunet.teacher.guidance import Caller
from prunet.teacher.process import DDPM
from prunet.teacher.teacher import Teacher
from prunet.training.losses import mse
from prunet.training.objectives.guidance import Guidance
from prunet.training.objectives.trajectory import in_full
from prunet.training.samples import FAKE_UPDATES
from prunet.training.session import Session

FAKE_RATE = 3.0  # learning rate of the fake score, relative to the student's


class Distribution(Guidance):
    """The loss `matching`, which has DMD's gradient, and that of `Trajectory` from where the student arrives (`jump`).

    The fake score has the student's shape and begins with the student's weights.
    """

    def __init__(self, teacher: Teacher, student: Net, stage: Stage, empty: Condition) -> None:
        super().__init__(teacher, student, (), stage, empty)
        self._copy, self._call = copy.deepcopy(student), teacher.architecture.call
        self._last_layers = [net.get_submodule(teacher.architecture.last_layer) for net in (student, self._copy)]
        self.names = ("matching", "jump")[: 2 if stage.jump_weight else 1]

    def start(self, session: Session) -> None:
        """Also puts the fake score on the session's device."""
        super().start(session)
        self._fake = FakeScore(self._copy, self._call, self._process, session)
        self.nets = (*self.nets, self._copy)
        session.accompany(self._fake)

    @contextmanager
    def running(self) -> Iterator[None]:
        with super().running(), ExitStack() as stack:
            for layer in self._last_layers:
                stack.enter_context(in_full(layer))
            yield

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        process, weight = self._process, self._stage.jump_weight
        timestep, condition = batch["timestep"], batch["condition"]
        noisy = self._arrived(model, batch["start"], timestep, condition)
        drawn = process.clean(noisy, self._call(model, noisy, timestep, condition).float(), timestep)
        self._fake.learn(drawn.detach(), condition, batch["noises"][:, 1:], batch["timesteps"][:, 1:])
        better = self._moved(drawn.detach(), condition, batch["noises"][:, 0], batch["timesteps"][:, 0])
        terms = [0.5 * mse(drawn, better)]
        loss = terms[0]
        if weight:
            target = process.clean_between(noisy, batch["landed"], timestep, batch["after"])
            terms.append(mse(drawn, target, process.snr(timestep).clamp(min=1)))
            loss = loss + weight * terms[1]
        return loss, torch.stack(terms).detach()

    @torch.no_grad()
    def _arrived(self, model: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the latents of the student's jumps from pure noise at `timestep` (B,), a time of its jumps."""
        jumps, process = self._stage.jumps or 1, self._process
        times = [torch.full_like(timestep, process.jump_time(jumps, number)) for number in range(jumps)]
        for now, after in itertools.pairwise(times):
            clean = process.clean(noisy, self._call(model, noisy, now, condition).float(), now)
            landed = process.landed(noisy, clean, now, after)
            noisy = torch.where((timestep < now).view(-1, 1, 1, 1), landed, noisy)
        return noisy

    @torch.no_grad()
    def _moved(self, drawn: Tensor, condition: Condition, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noises pictures, and moves them from the fake score's clean picture towards that of the guided teacher."""
        process = self._process
        noisy = process.add_noise(drawn, noise, timestep)
        real = process.clean(noisy, self._taught(noisy, timestep, condition).float(), timestep)
        fake = process.clean(noisy, self._fake(noisy, timestep, condition), timestep)
        return drawn - (fake - real) / ((drawn - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["matching"] + self._stage.jump_weight * means.get("jump", 0.0)}


class FakeScore:
    """A denoiser that learns what the student draws, after each step of the student, from all its pictures."""

    def __init__(self, net: Net, call: Caller, process: DDPM, session: Session) -> None:
        self._net = net.to(session.device).train().requires_grad_(True)
        if session.runtime.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        self._call, self._process, self._session = call, process, session
        # In evaluation mode accelerate sets the precision and leaves out DDP, because this network updates separately.
        self._model = session.accelerator.prepare_model(net, evaluation_mode=True)
        decay = session.stage.weight_decay
        optimizer = torch.optim.AdamW(self._net.parameters(), weight_decay=decay, fused=True)
        self._optimizer = session.accelerator.prepare_optimizer(optimizer)
        self._drawn: list[tuple[Tensor, Condition, Tensor, Tensor]] = []

    def __call__(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns its output (B, C, h, w), in fp32."""
        return self._call(self._model, noisy, timestep, condition).float()

    def learn(self, drawn: Tensor, condition: Condition, noises: Tensor, timesteps: Tensor) -> None:
        """Keeps pictures for the next step, with noise (B, updates, C, h, w) and timesteps (B, updates)."""
        self._drawn.append((drawn, condition, noises, timesteps))

    def step(self, learning_rate: float) -> None:
        """Learns to denoise the kept pictures."""
        accelerator, process = self._session.accelerator, self._process
        for group in self._optimizer.param_groups:
            group["lr"] = FAKE_RATE * learning_rate
        for update in range(FAKE_UPDATES):
            for drawn, condition, noises, timesteps in self._drawn:
                noise, timestep = noises[:, update], timesteps[:, update]
                output = self(process.add_noise(drawn, noise, timestep), timestep, condition)
                loss = mse(output, process.target(drawn, noise, timestep))
                accelerator.backward(loss / len(self._drawn))
            for parameter in self._net.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            accelerator.clip_grad_norm_(self._net.parameters(), self._session.stage.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._drawn.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"net": self._net.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
