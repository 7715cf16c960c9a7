"""Parameters and multiply-adds of a denoiser, from its config alone."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from prunet.denoisers.architecture import Architecture, config_text
from prunet.denoisers.known import architecture_of
from prunet.plan.effect import Size

#: Kinds of operations by patterns of their names, the first that fits: `bmm` is a matmul, but inside attention.
KINDS = {
    "attention": r"attention|bmm|softmax",
    "convolution": r"conv(olution|\dd)",
    "matmul": r"mm$|matmul|(\b|_)linear",
    "normalisation": r"norm|silu|gelu",
}


def size_of(config: Mapping[str, Any]) -> Size:
    """Parameters, and multiply-adds of one call at the native size.

    The matmuls inside attention (queries with keys, weights with values) are told apart, because published figures
    leave them out.
    """
    architecture, macs = architecture_of(config), macs_by_kind(config)
    return Size(
        parameters=sum(p.numel() for p in architecture.skeleton(config).parameters()),
        macs=macs["convolution"] + macs["matmul"],
        attention_macs=macs["attention"],
    )


def macs_by_kind(config: Mapping[str, Any], latent_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Multiply-adds of one call by kind: `convolution`, `matmul` (linear layers), `attention`.

    Of batch 1 with all text tokens, at the native size by default: half of the FLOPs that `torch.utils.flop_counter`
    counts on the meta device.
    """
    return dict(_macs_by_kind(architecture_of(config), config_text(config), latent_size))


def kind_of(operation: str) -> str:
    """The kind of an operation by its name (`aten::addmm`): one of `KINDS`, or `other`."""
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
