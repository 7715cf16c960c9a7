"""Classifier-free guidance (arXiv 2207.12598): what the teacher says of a prompt, away from what it says of none."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunet.denoisers.condition import Condition

#: `Architecture.call`
Caller = Callable[[Any, Tensor, Tensor, Condition], Tensor]


def guided(
    call: Caller, net: Any, noisy: Tensor, timestep: Tensor, condition: Condition, empty: Condition, scale: float
) -> Tensor:
    """u + scale (c - u) (B, C, h, w), of which c is called last; `empty`: the condition u of no prompt, as one row."""
    without = call(net, noisy, timestep, condition.without_prompt(empty))
    return without + scale * (call(net, noisy, timestep, condition) - without)
