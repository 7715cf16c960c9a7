"""The memory of distillation, computed from shapes, and the micro-batch that fits."""

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from prunet import processes
from prunet.denoisers.known import architecture_of
from prunet.errors import UserError
from prunet.plan.size import size_of
from prunet.recipe.training import Training
from prunet.runtime import Runtime
from prunet.training.lora import trained_count


def training_memory(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    latent_size: tuple[int, int],
    micro_batch: int,
    stage: Training,
    runtime: Runtime,
) -> dict[str, int]:
    """Estimates the bytes that distillation needs on the device, by part, from shapes.

    The student is in fp32, and its trained weights have gradients and AdamW's two moments. The teacher is in the
    runtime's precision. In half precision, the activations include a copy of the student's weights in half precision.
    `activations` are counted as if all existed at the same time; `prunet.training.memory.step_memory` simulates the
    step, which takes seconds.
    """
    t, s, trained = size_of(teacher).parameters, size_of(student).parameters, trained_count(student, stage.rank)
    half, shards = runtime.mixed_precision != "no", processes.count() if runtime.fsdp else 1
    weight = 1 if runtime.teacher_8bit or runtime.teacher_fp8 else 2 if half else 4
    # A sample's forward pass keeps the outputs of all leaf modules for the backward pass.
    elements = architecture_of(student).trace(student, latent_size).leaf_elements * micro_batch * stage.rows
    kept = 0.3 if runtime.gradient_checkpointing else 1.0
    return {
        "teacher": t * weight if stage.teacher_calls else 0,
        "student": s * 4 // shards,
        "gradients": trained * 4 // shards,
        "optimizer": trained * (2 if runtime.use_8bit_adam else 8) // shards,
        "ema": trained * 4 // shards if stage.ema_decay is not None and not runtime.offload_ema else 0,
        "activations": int(elements * (2 if half else 4) * kept) + (s * 2 if half else 0),
    }


def micro_batch_of(
    stage: Training,
    runtime: Runtime,
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    latent_size: tuple[int, int],
    ranks: int = 1,
) -> int:
    """Returns the samples at once on each device: as asked, or as many as fit. They must divide the batch."""
    share, rest = divmod(stage.batch_size, ranks)
    asked = runtime.micro_batch
    if rest or not share or (asked and share % asked):
        fits = [str(m) for m in range(1, share + 1) if share % m == 0] if share and not rest else []
        raise UserError(
            f"batch_size {stage.batch_size} cannot be divided among {ranks} process(es)"
            + (
                f" in micro-batches of {asked}: choose --micro-batch {', '.join(fits)}"
                if fits
                else ": choose a multiple"
            )
        )
    configs = teacher_config, student_config
    return asked or _largest_that_fits(
        share,
        runtime.torch_device,
        lambda micro: sum(training_memory(*configs, latent_size, micro, stage, runtime).values()),
    )


def device_memory(device: torch.device) -> int:
    """Returns the bytes that distillation may use: nine tenths of a GPU's memory, or half of the machine's."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total // 2


def _largest_that_fits(share: int, device: torch.device, need: Callable[[int], int]) -> int:
    """Returns the largest divisor of `share` with a step that fits on the device; at least 1.

    This depends on the whole memory of the device, not on the free memory: the same command must not round differently
    because another program is running.
    """
    budget = device_memory(device)
    divisors = (micro for micro in range(share, 1, -1) if share % micro == 0)
    return next((micro for micro in divisors if need(micro) <= budget), 1)
