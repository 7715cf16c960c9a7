"""Where and how prunet computes: device, precision, and options that save memory or time."""

from dataclasses import dataclass
from typing import Literal

import torch

from prunet import processes

Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class Runtime:
    """Where and how prunet computes; it changes results only by rounding.

    `micro_batch`: samples at once on each device (None: the most that fits). `log_every`: steps between two reads of
    the losses, the only points where the CPU waits for the device.

    Options that save memory: `gradient_checkpointing` (costs time), `offload_ema` (the average stays on the CPU),
    `use_8bit_adam` (bitsandbytes), `teacher_8bit` (torchao: weights of the teacher's linear layers in 8 bits), `fsdp`
    (the student's weights, gradients, moments and average are divided among the processes).

    Options that save time: `compile` (torch.compile of teacher and student, features included), `compile_blocks` (only
    their transformer blocks, in seconds instead of minutes), `channels_last` (the memory format of a GPU's
    convolutions), `teacher_fp8` (torchao: the teacher's linear layers multiply in fp8, on Hopper GPUs or later).
    """

    device: str | None = None
    precision: Precision = "auto"
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    offload_ema: bool = False
    use_8bit_adam: bool = False
    teacher_8bit: bool = False
    teacher_fp8: bool = False
    fsdp: bool = False
    compile: bool = False
    compile_blocks: bool = False
    channels_last: bool = False
    tracker: str | None = None
    log_every: int = 10

    @property
    def torch_device(self) -> torch.device:
        """The device of this process; the best available one if none is named."""
        kind = self.device or ("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
        if kind == "cuda" and processes.count() > 1:
            return torch.device("cuda", processes.local_rank())
        return torch.device(kind)

    def use_device(self) -> None:
        """Makes this device CUDA's current one, because accelerate ignores the number in `device`."""
        if self.torch_device.type == "cuda" and self.torch_device.index is not None:
            torch.cuda.set_device(self.torch_device)

    @property
    def mixed_precision(self) -> str:
        """The precision; `auto` is bf16 where the hardware multiplies it, else fp16 on CUDA, else full precision."""
        if self.precision != "auto":
            return self.precision
        if self.torch_device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        fast = self.torch_device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return "bf16" if fast else "no"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of frozen weights."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
