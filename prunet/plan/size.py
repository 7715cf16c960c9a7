"""Parameters and multiply-adds of a denoiser, computed from its config."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from prunet.denoisers.architecture import Architecture, config_text
from prunet.denoisers.known import architecture_of

#: Kinds of operations and patterns of their names; the first match counts (`bmm` is a matmul, but inside attention).
KINDS = {
    "attention": r"attention|bmm|softmax",
    "convolution": r"conv(olution|\dd)",
    "matmul": r"mm$|matmul|(\b|_)linear",
    "normalisation": r"norm|silu|gelu",
}


@dataclass(frozen=True)
class Size:
    """Parameters of a denoiser, and multiply-adds (MACs) of one call at its native size (batch 1, all text tokens)."""

    parameters: int
    macs: int  # without the matmuls inside attention, as the papers count
    attention_macs: int


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
    return dict(_macs_by_kind(architecture_of(config), config_text(config), latent_size))


def kind_of(operation: str) -> str:
    """Returns the kind of an operation from its name (`aten::addmm`): one of `KINDS`, or `other`."""
    name = operation.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


@lru_cache(maxsize=32)
def _macs_by_kind(architecture: Architecture, text: str, latent_size: tuple[int, int] | None) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        architecture.call_skeleton(json.loads(text), latent_size)
    flops = {"convolution": 0, "matmul": 0, "attention": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops[kind_of(str(operation))] += count
    return {kind: count // 2 for kind, count in flops.items()}
