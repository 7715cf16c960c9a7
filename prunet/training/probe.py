"""A distillation step with random weights and no data, for `estimate` to time and `memory` to count."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunet.denoisers.architecture import Net
from prunet.denoisers.known import architecture_of
from prunet.denoisers.pairs import Pair
from prunet.denoisers.taps import tap
from prunet.training.lora import is_target
from prunet.training.losses import feature_losses, mse


@contextmanager
def probe(
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    rank: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Net, Net, Callable[..., Tensor]]]:
    """Returns a teacher in `dtype`, a student in fp32, and a function that computes the loss () of one micro-batch.

    The student computes under autocast. The function's argument is the number of calls of the teacher, by default 1.

    Args:
        shape: number of samples, height and width of their latents.
        rank: rank of the LoRA that is trained instead of the student's weights.
    """
    device, half = torch.device(device), dtype != torch.float32
    architecture = architecture_of(teacher_config)
    with device:
        student = architecture.make(student_config).train()
        if rank:
            _add_lora(student, rank)
        with default_dtype(dtype):
            teacher = architecture.make(teacher_config).eval().requires_grad_(False)
    if gradient_checkpointing:
        student.enable_gradient_checkpointing()

    def inputs(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        return architecture.example_inputs(config, shape[0], latent_size=shape[1:], device=device, dtype=dtype)

    with (
        tap([student.get_submodule(pair.student) for pair in pairs]) as ours,
        tap([teacher.get_submodule(pair.teacher) for pair in pairs]) as theirs,
    ):

        def loss(teacher_calls: int = 1) -> Tensor:
            given = inputs(teacher_config, dtype)
            eps_t = given["sample"]
            with torch.no_grad():
                for _ in range(teacher_calls):
                    eps_t = teacher(**given).sample
            with torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half):
                eps_s = student(**inputs(student_config, torch.float32)).sample
            features = feature_losses(ours.take(), theirs.take()).sum() if pairs else 0
            return mse(eps_s, eps_t) + features

        yield teacher, student, loss


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new tensors in `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _add_lora(net: Net, rank: int) -> None:
    """Imitates `prunet.training.lora.add_lora` for memory and time.

    peft cannot work on tensors without contents, which count the memory.
    """
    net.requires_grad_(False)
    for name, layer in [(name, module) for name, module in net.named_modules() if is_target(name)]:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, _WithLora(layer, rank))


class _WithLora(nn.Module):
    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.layer(features) + self.up(self.down(features))
        return out
