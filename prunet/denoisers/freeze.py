"""Frozen modules."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Puts a module into eval mode without gradients, with aligned weights, so that equal weights round equally.

    Weights mapped from a file lie at addresses of any alignment, and on some CPUs the BLAS rounds differently for
    unaligned addresses (AMD Zen 5: equal weights, other last bits). PyTorch aligns a copy. A single weight that is not
    copied would keep the whole file in memory beside the copies, so all weights are copied or none.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.data_ptr() % 64 for tensor in tensors):
        for tensor in tensors:
            tensor.data = tensor.data.clone()
    return module.eval().requires_grad_(False)
