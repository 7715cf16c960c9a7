"""Parameters and multiply-adds of a denoiser, computed from its config."""

import re
from collections.abc import Mapping
from typing import Any

from prunet.denoisers.known import architecture_of
from prunet.plan.effect import Size

#: Kinds of operations and patterns of their names; the first match counts (`bmm` is a matmul, but inside attention).
KINDS = {
    "attention": r"attention|bmm|softmax",
    "convolution": r"conv(olution|\dd)",
    "matmul": r"mm$|matmul|(\b|_)linear",
    "normalisation": r"norm|silu|gelu",
}


def size_of(config: Mapping[str, Any]) -> Size:
    """Computes the parameters, and the multiply-adds of one call at the native size.

    The matmuls inside attention (queries with keys, weights with values) are counted separately, because published
    figures leave them out.
    """
    architecture, macs = architecture_of(config), macs_by_kind(config)
    return Size(
        parameters=sum(p.numel() for p in architecture.skeleton(config).parameters()),
        macs=macs["convolution"] + macs["matmul"],
        attention_macs=macs["attention"],
    )


def macs_by_kind(config: Mapping[str, Any], latent_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Returns the multiply-adds of one call by kind: `convolution`, `matmul` (linear layers), `attention`.

    The call has batch 1 and all text tokens, by default at the native size. Multiply-adds are half of the FLOPs that
    `torch.utils.flop_counter` counts on the meta device.
    """
    macs = {"convolution": 0, "matmul": 0, "attention": 0}
    for operation, flops in architecture_of(config).trace(config, latent_size).flops.items():
        macs[kind_of(operation)] += flops // 2
    return macs


def kind_of(operation: str) -> str:
    """Returns the kind of an operation from its name (`aten::addmm`): one of `KINDS`, or `other`."""
    name = operation.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")
