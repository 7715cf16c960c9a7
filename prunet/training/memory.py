"""Peak memory of a distillation step: the step runs with tensors that have shapes but no contents."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunet.denoisers.known import architecture_of
from prunet.denoisers.pairs import Pair
from prunet.runtime import Runtime
from prunet.training.probe import probe


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the `with` block; `most` is their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            # A view of an older tensor (such as a transposed weight) needs no memory.
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.size()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._storages.pop(key)

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def step_memory(
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    latent_size: tuple[int, int],
    micro_batch: int,
    accumulate: int,
    runtime: Runtime,
    rank: int | None = None,
) -> int:
    """Returns the peak bytes of a step, without weights, gradients and moments.

    These are activations, features, weights cast to half precision, and temporary results.
    """
    setting: dict[str, Any] = {"shape": (micro_batch, *latent_size), "rank": rank}
    setting |= {"gradient_checkpointing": runtime.gradient_checkpointing}
    device, half = runtime.torch_device, runtime.mixed_precision != "no"
    dtype = torch.bfloat16 if half else torch.float32
    with (
        FakeTensorMode(),
        probe(teacher_config, student_config, pairs, dtype=dtype, **setting) as (teacher, student, loss),
        architecture_of(teacher_config).fast_attention([teacher, student], device, half=half),
        Living() as living,
    ):
        for _ in range(min(accumulate, 2)):  # the gradients of the first exist while the second runs
            loss().backward()
        gradients = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    return max(0, int(living.most - gradients))
