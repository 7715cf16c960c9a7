"""What makes distillation fast on a GPU: the memory format of convolutions, compiled blocks, a teacher in 8 bits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Net

#: One function of diffusers' is compiled for every shape that its blocks meet, in both models and in the sheets.
#: Beyond 8 of them dynamo would run the rest uncompiled, and only a warning would say so.
SHAPES = 64


def set_memory_format(form: torch.memory_format, nets: Iterable[Net], optimizer: Any = None, ema: Any = None) -> None:
    """Stores convolutions' weights (O, I, H, W), with their moments and averages, in the memory format `form`.

    In `torch.channels_last` cuDNN's tensor-core convolutions take features as they are; in the default format they
    are transposed on the way in and out. Values and shapes stay the same.
    """
    for net in nets:
        net.to(memory_format=form)
    for state in optimizer.state.values() if optimizer else ():
        state.update({key: value.to(memory_format=form) for key, value in state.items() if _is_kernel(value)})
    if ema:
        ema.shadow_params = [s.to(memory_format=form) if _is_kernel(s) else s for s in ema.shadow_params]


def _is_kernel(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


@contextmanager
def compiled_blocks(nets: Iterable[Net], on: bool) -> Iterator[None]:
    """The repeated transformer blocks of `nets` run compiled while it lasts, if `on` (PyTorch's regional compilation).

    Blocks of equal shapes share one program, so that the 70 blocks of SDXL take as long to compile as two.
    """
    if not on:
        yield
        return
    nets = list(nets)
    for net in nets:
        net.compile_repeated_blocks(dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    finally:
        for module in (module for net in nets for module in net.modules()):
            module._compiled_call_impl = None


def in_8_bits(net: Net, *, fp8: bool) -> Net:
    """Linear layers by torchao. `fp8`: weights (bf16 before) and activations scaled by row, for the fp8 tensor cores;
    else int8 weights with a scale a row, and activations as they are.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow, quantize_

    quantize_(net, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if fp8 else Int8WeightOnlyConfig())
    return net


def has_fp8(device: torch.device) -> bool:
    """Whether fp8 matmuls scaled by row run on the device (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
