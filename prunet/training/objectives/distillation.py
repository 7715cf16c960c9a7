"""Distillation by output and features (arXiv 2305.15798, section 3.2; arXiv 2401.02677, section 3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.denoisers.pairs import Pair, term_factors
from prunet.denoisers.taps import Features, tap
from prunet.recipe.stage import Stage
from prunet.teacher.teacher import Teacher, after_overflow
from prunet.training.gpu import in_8_bits, set_memory_format
from prunet.training.losses import feature_losses, mse
from prunet.training.objectives.objective import Objective
from prunet.training.session import Session


class Distillation(Objective):
    """Learning from the data (`task`), from the teacher's output (`output`), and from its features (`feature/MODULE`).

    Each pair has one feature term.

    Raises:
        UserError: a pattern of the losses' weights matches no pair.
    """

    def __init__(self, teacher: Teacher, student: Net, pairs: Sequence[Pair], stage: Stage) -> None:
        self._teacher, self._pairs, self._stage = teacher, pairs, stage
        # Pairs are module objects of the bare model, so they are found before it is wrapped.
        self._student_modules = [student.get_submodule(pair.student) for pair in pairs]
        self._factors = term_factors(pairs, stage.losses.weights)
        self._process = teacher.process
        self.nets: tuple[Net, ...] = ()
        self.names = ("task", "output", *(f"feature/{pair.teacher}" for pair in pairs))

    def start(self, session: Session) -> None:
        """Puts the teacher on the session's device."""
        runtime, device = session.runtime, session.device
        net = self._teacher.unet.to(device)
        if runtime.teacher_8bit or runtime.teacher_fp8:
            net = in_8_bits(net, fp8=runtime.teacher_fp8)
        if runtime.channels_last:
            set_memory_format(torch.channels_last, [net])
        self.nets, self._net = (net,), session.compiled(net)
        # Compiled into one kernel, instead of one for each operation of each pair.
        fused = runtime.compile or runtime.compile_blocks
        self._compare: Any = torch.compile(feature_losses) if fused else feature_losses
        self._process = self._process.to(device)
        self._scale = torch.tensor(self._factors, device=device)
        self._overflows = torch.zeros((), device=device)  # micro-batches where the teacher's output is not finite
        self._session = session

    @contextmanager
    def running(self) -> Iterator[None]:
        """Collects the features of teacher and student."""
        used = self._stage.losses.feature > 0
        teacher_modules = [self.nets[0].get_submodule(pair.teacher) for pair in self._pairs]
        with tap(self._student_modules if used else []) as ours, tap(teacher_modules if used else []) as theirs:
            self._ours: Features = ours
            self._theirs: Features = theirs
            yield
        if self._session.runtime.channels_last:
            set_memory_format(torch.contiguous_format, self.nets)

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the terms, and the terms (`Objective`)."""
        latents, noise, timestep, condition = (batch[k] for k in ("latents", "noise", "timestep", "condition"))
        weights, process, call = self._stage.losses, self._process, self._teacher.architecture.call
        noisy, target = process.add_noise(latents, noise, timestep), process.target(latents, noise, timestep)
        theirs = self._taught(noisy, timestep, condition)
        ours = call(model, noisy, timestep, condition)
        # Min-SNR weighs only the task loss, never the terms learned from the teacher.
        gamma = self._stage.min_snr_gamma
        weight = process.min_snr_weight(timestep, gamma) if gamma else None
        terms = torch.stack([mse(ours, target, weight), mse(ours, theirs)])
        loss = weights.task * terms[0] + weights.output * terms[1]
        if len(self._ours):
            # Without a variable, so that the teacher's features are freed before the backward pass.
            features = self._compare(self._ours.take(), self._theirs.take(), weights.normalize)
            loss = loss + weights.feature * (self._scale * features).sum()
            terms = torch.cat([terms, features])
        return loss, terms

    @torch.no_grad()
    def _taught(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the teacher's output, computed in its own precision."""
        dtype = self.nets[0].dtype
        theirs = self._teach(noisy.to(dtype), timestep, condition.to(noisy.device, dtype))
        self._overflows += ~theirs.isfinite().all()
        return theirs

    def _teach(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the target of the student's output; the teacher's features are those of its last call."""
        return self._teacher.architecture.call(self._net, noisy, timestep, condition)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns `loss`, which is minimised, `task`, `output`, and `feature`, the weighted sum of its terms."""
        weights = self._stage.losses
        terms = [means[name] for name in self.names[2:]]
        feature = sum(factor * value for factor, value in zip(self._factors, terms, strict=True))
        total = weights.task * means["task"] + weights.output * means["output"] + weights.feature * feature
        return {"loss": total, "task": means["task"], "output": means["output"], "feature": feature}

    def blame(self) -> str | None:
        """Blames the teacher if its own output is not finite."""
        if not self._session.accelerator.reduce(self._overflows, "sum"):
            return None
        dtype = self.nets[0].dtype
        return (
            f"the output of the teacher {self._teacher.source} itself is not finite: it overflows in {dtype}: "
            f"{after_overflow(dtype)}"
        )
