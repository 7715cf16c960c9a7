"""Peak memory of a distillation step, from shapes: the step is gone through with tensors that have no contents."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunet import unet
from prunet.cpu import fast_attention
from prunet.losses import feature_losses, mse
from prunet.pairs import Pair
from prunet.size import example_inputs
from prunet.taps import tap


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors made since; `most` is what was needed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            # A view of what was there before (a weight, transposed) is nothing new.
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
    device: torch.device,
    half: bool,
    gradient_checkpointing: bool,
) -> int:
    """Bytes that a step needs at its worst moment beside weights, gradients and moments: activations, features,
    weights cast to half precision, temporary results.
    """
    teacher_dtype = torch.bfloat16 if half else torch.float32
    with FakeTensorMode():
        with _default_dtype(teacher_dtype):
            teacher = unet.make_unet(dict(teacher_config)).eval().requires_grad_(False)
        student = unet.make_unet(dict(student_config)).train()
        if gradient_checkpointing:
            student.enable_gradient_checkpointing()
        theirs = [teacher.get_submodule(pair.teacher) for pair in pairs]
        ours = [student.get_submodule(pair.student) for pair in pairs]

        def inputs(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
            return example_inputs(config, micro_batch, latent_size=latent_size, dtype=dtype)

        with (
            Living() as living,
            fast_attention([teacher, student], device, half=half),
            tap(ours) as student_features,
            tap(theirs) as teacher_features,
        ):
            for _ in range(min(accumulate, 2)):  # the second one meets the gradients of the first
                with torch.no_grad():
                    eps_t = teacher(**inputs(teacher_config, teacher_dtype)).sample
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    eps_s = student(**inputs(student_config, torch.float32)).sample
                features = feature_losses(student_features.take(), teacher_features.take()) if pairs else eps_s[:0]
                (mse(eps_s, eps_t) + features.sum()).backward()
                del eps_t, eps_s, features
        gradients = sum(p.numel() * p.element_size() for p in student.parameters())
    return max(0, living.most - gradients)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
