"""Where and how it runs: device, precision, and what saves memory or time."""

from dataclasses import dataclass
from typing import Literal

import torch

from prunet import processes

Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class Runtime:
    """Where and how it runs; no result depends on it but for rounding.

    `micro_batch`: samples at once on each device (None: the most that fits); `log_every`: steps between two read-backs
    of the losses, which are the only points where the device is waited for. What saves memory: `gradient_checkpointing`
    (costs time), `offload_ema` (the average waits on the CPU), `use_8bit_adam` (bitsandbytes), `teacher_8bit` (torchao:
    its linear layers' weights in 8 bits), `fsdp` (several processes share out the student's weights, gradients, moments
    and average). What saves time: `compile` (teacher and student by torch.compile, features included),
    `compile_blocks` (their transformer blocks alone, which takes seconds instead of minutes), `channels_last` (the
    memory format in which convolutions of GPUs work), `teacher_fp8` (torchao: the teacher's linear layers multiply in
    fp8, on GPUs from Hopper on).
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
        """The device of this process: the best there is, if none was named."""
        kind = self.device or ("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
        if kind == "cuda" and processes.count() > 1:
            return torch.device("cuda", processes.local_rank())
        return torch.device(kind)

    def use_device(self) -> None:
        """accelerate takes the current CUDA device, whatever its number."""
        if self.torch_device.type == "cuda" and self.torch_device.index is not None:
            torch.cuda.set_device(self.torch_device)

    @property
    def mixed_precision(self) -> str:
        """`auto` is bf16 where the hardware multiplies it, else full precision."""
        if self.precision != "auto":
            return self.precision
        if self.torch_device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        fast = self.torch_device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return "bf16" if fast else "no"

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
