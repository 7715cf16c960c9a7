"""Parameters and multiply-adds of a denoiser, from its config alone."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunet.denoisers.unet2d import form as unet
from prunet.errors import UserError
from prunet.plan.plan import Size

TEXT_TOKENS = 77
#: Kinds of operations by patterns of their names, the first that fits: `bmm` is a matmul, but inside attention.
KINDS = {
    "attention": r"attention|bmm|softmax",
    "convolution": r"conv(olution|\dd)",
    "matmul": r"mm$|matmul|(\b|_)linear",
    "normalisation": r"norm|silu|gelu",
}


def native_latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the latents that the model was made for."""
    size = config.get("sample_size") or 64
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def example_inputs(
    config: Mapping[str, Any],
    batch_size: int = 1,
    *,
    latent_size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of the denoiser's `forward`: zeros (or meta tensors) of the right shapes.

    `sample` (B, C, h, w), `timestep` (B,), `encoder_hidden_states` (B, 77, D), and for SDXL `added_cond_kwargs`
    with `text_embeds` (B, P) and `time_ids` (B, 6).
    """
    height, width = latent_size or native_latent_size(config)
    dim = config["cross_attention_dim"]
    dim = dim[0] if isinstance(dim, list | tuple) else dim
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch_size, config.get("in_channels", 4), height, width, device=device, dtype=dtype),
        "timestep": torch.zeros(batch_size, device=device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch_size, TEXT_TOKENS, dim, device=device, dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch_size, pooled, device=device, dtype=dtype),
            "time_ids": torch.zeros(batch_size, 6, device=device, dtype=dtype),
        }
    return inputs


@torch.no_grad()
def call_skeleton(config: Mapping[str, Any], latent_size: tuple[int, int] | None = None) -> None:
    """One call on the meta device, for what watches it; the only place where a config can turn out not to work.

    Raises:
        UserError: the U-Net of this config cannot be called.
    """
    net = unet.skeleton(config)
    try:
        net(**example_inputs(config, latent_size=latent_size, device="meta"))
    except Exception as error:  # of any kind: diffusers takes the values as they are
        raise UserError(f"The U-Net of this config cannot be called: {error or type(error).__name__}") from error


def size_of(config: Mapping[str, Any]) -> Size:
    """Parameters, and multiply-adds of one call at the native size.

    The matmuls inside attention (queries with keys, weights with values) are told apart, because published figures
    leave them out.
    """
    net, macs = unet.skeleton(config), macs_by_kind(config)
    return Size(
        parameters=sum(p.numel() for p in net.parameters()),
        macs=macs["convolution"] + macs["matmul"],
        attention_macs=macs["attention"],
        latent_size=native_latent_size(config),
    )


def macs_by_kind(config: Mapping[str, Any], latent_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Multiply-adds of one call (batch 1, 77 tokens) by kind: `convolution`, `matmul` (linear layers), `attention`.

    Half of the FLOPs that `torch.utils.flop_counter` counts on the meta device, at the native size by default.
    """
    return dict(_macs_by_kind(_text(config), latent_size))


def kind_of(operation: str) -> str:
    """The kind of an operation by its name (`aten::addmm`): one of `KINDS`, or `other`."""
    name = operation.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def _text(config: Mapping[str, Any]) -> str:
    """A config as a key for a cache."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


@lru_cache(maxsize=32)
def _macs_by_kind(text: str, latent_size: tuple[int, int] | None) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        call_skeleton(json.loads(text), latent_size)
    flops = {"convolution": 0, "matmul": 0, "attention": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops[kind_of(str(operation))] += count
    return {kind: count // 2 for kind, count in flops.items()}


@lru_cache(maxsize=32)
def _activation_elements(text: str, latent_size: tuple[int, int]) -> int:
    config = json.loads(text)
    net, total = unet.skeleton(config), 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, torch.Tensor) else 0

    handles = [m.register_forward_hook(count) for m in net.modules() if not any(m.children())]
    try:
        call_skeleton(config, latent_size)
    finally:
        for handle in handles:
            handle.remove()
    return total


def activation_elements(config: Mapping[str, Any], latent_size: tuple[int, int]) -> int:
    """Elements that one sample's forward pass leaves for the backward pass: the outputs of all leaf modules."""
    return _activation_elements(_text(config), latent_size)


def training_memory(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    *,
    latent_size: tuple[int, int],
    micro_batch: int,
    half: bool,
    ema: bool,
    gradient_checkpointing: bool = False,
    use_8bit_adam: bool = False,
    teacher_8bit: bool = False,
    shards: int = 1,
) -> dict[str, int]:
    """Bytes that distillation needs on the device, by part: an estimate from shapes.

    The student is kept in fp32 with gradients and AdamW's two moments; the teacher in half precision if `half`, where
    a step's activations hold the student's weights in half precision as well. `ema`: whether an average is kept on the
    device. `shards`: processes among which what is the student's is shared out.
    """
    t, s = size_of(teacher).parameters, size_of(student).parameters
    elements = activation_elements(student, latent_size) * micro_batch
    kept = 0.3 if gradient_checkpointing else 1.0
    return {
        "teacher": t * (1 if teacher_8bit else 2 if half else 4),
        "student": s * 4 // shards,
        "gradients": s * 4 // shards,
        "optimizer": s * (2 if use_8bit_adam else 8) // shards,
        "ema": s * 4 // shards if ema else 0,
        "activations": int(elements * (2 if half else 4) * kept) + (s * 2 if half else 0),
    }


def fitting_micro_batch(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    *,
    batch_size: int,
    device: torch.device,
    **options: Any,
) -> int:
    """The largest divisor of `batch_size` whose estimated memory fits the device; at least 1.

    Judged by the memory that the device has, not by what is free now: the same command must not round differently
    because something else was running.
    """
    if device.type == "cuda":
        budget = 0.9 * torch.cuda.get_device_properties(device).total_memory
    else:
        budget = 0.5 * psutil.virtual_memory().total
    for micro in range(batch_size, 1, -1):
        if batch_size % micro == 0:
            needed = training_memory(teacher, student, micro_batch=micro, **options)
            if sum(needed.values()) <= budget:
                return micro
    return 1
