"""A student in training: on its device, wrapped, with optimizer, average and checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.denoisers.known import fast_attention
from prunet.recipe.training import Training
from prunet.runtime import Runtime
from prunet.training.allocator import kept_memory
from prunet.training.checkpoints import State, resume, save, trained_parameters
from prunet.training.fsdp import local, shard, unsharded, whole
from prunet.training.gpu import compiled_blocks, set_memory_format


class Session:
    """Puts `student` on the device, and resumes from the newest checkpoint in `folder` (at step `start`).

    The weights that require a gradient are trained.

    Raises:
        UserError: the checkpoint is of another stage, or damaged.
    """

    def __init__(self, student: Net, stage: Training, folder: Path, runtime: Runtime) -> None:
        AcceleratorState._reset_state()  # it would keep a process's first precision
        self.accelerator = Accelerator(
            mixed_precision=runtime.mixed_precision,
            cpu=runtime.torch_device.type == "cpu",
            log_with=runtime.tracker,
            project_dir=str(folder) if runtime.tracker else None,
            # DDP averages gradients in place, without a second copy.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.device, self.runtime, self.stage, self.folder = self.accelerator.device, runtime, stage, folder
        self.student = student.to(self.device).train()
        if runtime.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if runtime.fsdp:
            shard(student, self.device)
        trained = list(trained_parameters(student).values())
        self._held = [local(parameter) for parameter in trained]
        optimizer = _adamw(runtime)(trained, lr=stage.learning_rate, weight_decay=stage.weight_decay)
        self._ema = EMAModel(self._held, decay=stage.ema_decay, foreach=True) if stage.ema_decay else None
        self._state = State(student, optimizer, self._ema, self.accelerator.scaler)
        #: The number of steps done, and the sums of the losses since the last row of the log, if a checkpoint kept
        #: them.
        self.start, self.unlogged = resume(self._state, folder, stage)
        if runtime.channels_last:
            set_memory_format(torch.channels_last, [student], optimizer, self._ema)
        if self._ema and runtime.offload_ema:
            self._ema.to("cpu")
        # In evaluation mode accelerate sets the precision but leaves out DDP, since FSDP takes its place.
        self.model: Any = self.accelerator.prepare_model(self.compiled(student), evaluation_mode=runtime.fsdp)
        self._optimizer = self._state.optimizer = self.accelerator.prepare_optimizer(optimizer)
        if runtime.tracker:
            self.accelerator.init_trackers("prunet", config={"stage": stage.model_dump_json()})

    def compiled(self, net: Any) -> Any:
        """Returns a model or function, compiled if the runtime says so."""
        return torch.compile(net) if self.runtime.compile else net

    @contextmanager
    def running(self, frozen: Sequence[Net]) -> Iterator[None]:
        """Makes the steps fast inside the `with` block, for the student and the `frozen` models."""
        nets, half = [*frozen, self.student], self.runtime.mixed_precision != "no"
        with ExitStack() as stack:
            stack.enter_context(kept_memory(self.device))
            for net in nets:
                stack.enter_context(fast_attention(net, self.device, half=half))
            stack.enter_context(compiled_blocks(nets, self.runtime.compile_blocks))
            yield

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Averages gradients among the processes only after the `last` micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` () to those of the step."""
        self.accelerator.backward(loss)

    def step(self, learning_rate: float) -> Tensor:
        """Updates the weights and the average. Returns the norm () of the gradients before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.stage.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema and self.runtime.offload_ema:  # computed there, so that the device needs no memory for it
            self._ema.step([held.detach().to("cpu").requires_grad_() for held in self._held])
        elif self._ema:
            self._ema.step(self._held)
        total: Tensor = whole(norm)
        return total

    @property
    def skips_overflow(self) -> bool:
        """Whether steps with gradients that overflow are skipped (fp16)."""
        return self.accelerator.scaler is not None

    @contextmanager
    def drawing(self, *, average: bool) -> Iterator[Net]:
        """Yields the student as it would draw now: with the weights of its average, if it has one and if asked."""
        ema = self._ema if average else None
        if ema:
            ema.store(self._held)
            ema.copy_to(self._held)
        self.student.eval()
        try:
            yield self.student
        finally:
            self.student.train()
            if ema:
                ema.restore(self._held)

    def save(self, step: int, keep: int, unlogged: dict[str, Any]) -> None:
        """Writes a checkpoint after `step` steps, and deletes all except the newest `keep`."""
        save(self._state, self.folder, step, self.stage, keep, unlogged)

    def finish(self) -> Net:
        """Returns the student on the CPU, with the weights of its average if it has one."""
        for tracker in self.accelerator.trackers:  # `end_training` would end the group of processes as well
            tracker.finish()
        if self._ema:
            self._ema.copy_to(self._held)
        student = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        student = getattr(student, "_orig_mod", student)  # accelerate leaves torch.compile's wrapper below DDP's
        if self.runtime.fsdp:
            student = unsharded(student)
        student.__dict__.pop("forward", None)  # accelerate leaves one without diffusers' decorators
        student.disable_gradient_checkpointing()
        if self.runtime.channels_last:
            set_memory_format(torch.contiguous_format, [student])
        net: Net = student.eval().requires_grad_(False).to("cpu")
        return net


def _adamw(runtime: Runtime) -> Any:
    if not runtime.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)  # one kernel; several times as fast as a loop over the weights
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit
