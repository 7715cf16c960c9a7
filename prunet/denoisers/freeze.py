"""A module that is called and nothing else."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Ready to be called and nothing else; with weights where sums are rounded alike.

    Weights mapped from a file lie at addresses of any alignment, and on some CPUs the BLAS takes another path for those
    (AMD Zen 5: equal weights, other last bits). A copy lies where PyTorch aligns it. One weight that is not copied
    would keep the whole file in memory beside the copies, so it is all or none.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.data_ptr() % 64 for tensor in tensors):
        for tensor in tensors:
            tensor.data = tensor.data.clone()
    return module.eval().requires_grad_(False)
