"""The losses of distillation, as plain functions.

L = w_task * MSE(eps_S, target) + w_output * MSE(eps_S, eps_T) + w_feature * sum over pairs of MSE(f_S, f_T)
(arXiv 2305.15798, equations 1 to 4), every MSE a plain mean over all elements.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error over all elements in fp32; `weight` (B,) weighs samples."""
    if weight is None:
        return _MeanSquaredError.apply(prediction, target)  # type: ignore[no-any-return]
    each = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    return (each * weight).mean()


class _MeanSquaredError(torch.autograd.Function):
    """Computes in fp32, like `F.mse_loss` of both as floats, but keeps less for the backward pass.

    It keeps only the difference of both features, in the precision of the gradient, so the teacher's feature can be
    freed at once.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        apart = prediction.float() - target.float()
        ctx.save_for_backward(apart.to(prediction.dtype))
        return apart.square().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (apart,) = ctx.saved_tensors
        # A GPU would first round the factor to the features' precision, and fp16 can hardly represent it.
        slope = (apart.float() * (grads[0] * (2 / apart.numel()))).to(apart.dtype)
        return slope if ctx.needs_input_grad[0] else None, -slope if ctx.needs_input_grad[1] else None


def feature_losses(student: Sequence[Tensor], teacher: Sequence[Tensor], normalize: bool = False) -> Tensor:
    """Returns the MSE of each pair, as a vector (P,).

    `normalize` divides each by the mean square of the teacher's feature, so that a few large features do not drown the
    rest. This is the idea of LAPTOP-Diff (arXiv 2404.11098), here as the relative squared error of each sample, so that
    it does not depend on which samples share a micro-batch.
    """
    return torch.stack(
        [mse(s, t, _inverse_power(t) if normalize else None) for s, t in zip(student, teacher, strict=True)]
    )


def _inverse_power(feature: Tensor) -> Tensor:
    """Returns 1 / mean square of each sample, from (B, ...) to (B,)."""
    return 1 / feature.float().square().flatten(1).mean(1).clamp(min=1e-12)
