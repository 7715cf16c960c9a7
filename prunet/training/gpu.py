"""Fast distillation on a GPU: the memory format of convolutions, compiled blocks, a teacher in 8 bits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Net

#: Limit of compilations of one function. A function of diffusers is compiled for every shape of its inputs, in both
#: models and in the sheets; by default dynamo runs the rest uncompiled after 8, with only a warning.
SHAPES = 64


def set_memory_format(form: torch.memory_format, nets: Iterable[Net], optimizer: Any = None, ema: Any = None) -> None:
    """Stores the weights of convolutions (O, I, H, W), with their moments and averages, in the memory format `form`.

    In `torch.channels_last` cuDNN's tensor-core convolutions use features as they are; in the default format they
    transpose inputs and outputs. Values and shapes stay the same.
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
    """Compiles the transformer blocks of `nets` inside the `with` block, if `on` (PyTorch's regional compilation).

    Blocks of equal shapes share one program, so the 70 blocks of SDXL take as long to compile as two.
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
    """Converts linear layers to 8 bits with torchao.

    `fp8`: weights (bf16 before) and activations are scaled by row, for the fp8 tensor cores. Otherwise weights are int8
    with a scale for each row, and activations stay as they are.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow, quantize_

    quantize_(net, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if fp8 else Int8WeightOnlyConfig())
    return net


def has_fp8(device: torch.device) -> bool:
    """Returns whether the device can run fp8 matmuls scaled by row (Hopper or later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
