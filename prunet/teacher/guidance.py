"""Classifier-free guidance (arXiv 2207.12598): moves the output for a prompt away from the output for no prompt."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunet.denoisers.condition import Condition

#: `Architecture.call`.
Caller = Callable[[Any, Tensor, Tensor, Condition], Tensor]


def guided(
    call: Caller,
    net: Any,
    noisy: Tensor,
    timestep: Tensor,
    condition: Condition,
    empty: Condition,
    scale: float | Tensor,
) -> Tensor:
    """Returns u + scale (c - u), (B, C, h, w), with outputs c for the prompt and u for no prompt; c is computed last.

    `empty`: the condition of no prompt, one row. `scale`: a number, or one for each sample (B, 1, 1, 1).
    """
    without = call(net, noisy, timestep, condition.without_prompt(empty))
    return without + scale * (call(net, noisy, timestep, condition) - without)
