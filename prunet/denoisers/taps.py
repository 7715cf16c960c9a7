"""Features of modules, collected by hooks while the model runs. The hooks last until the `with` block ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Features(list[Tensor | None]):
    """The latest output of each tapped module, in the order of the modules."""

    def take(self) -> list[Tensor]:
        """Returns the features of the last forward pass, and drops them, so that their memory can be freed.

        Raises:
            RuntimeError: a tapped module did not run.
        """
        missing = [i for i, feature in enumerate(self) if feature is None]
        if missing:
            raise RuntimeError(f"tapped modules {missing} did not run in this forward pass")
        out = [feature for feature in self if feature is not None]
        self[:] = [None] * len(self)
        return out


@contextmanager
def tap(modules: Sequence[nn.Module], device: torch.device | str | None = None) -> Iterator[Features]:
    """Collects the output of each module; if it is a tuple (a down block also returns its skips), the first item.

    `device`: where the features are kept; by default where they are computed.

    The modules are objects of the bare model, so a wrapper (DDP, FSDP, `torch.compile`) cannot lose them.
    """
    features = Features([None] * len(modules))

    def hook_for(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return  # gradient checkpointing computes it again for the backward pass, which would keep its memory
            feature = output[0] if isinstance(output, tuple) else output
            features[i] = feature if device is None else feature.to(device)

        return hook

    handles = [module.register_forward_hook(hook_for(i)) for i, module in enumerate(modules)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
