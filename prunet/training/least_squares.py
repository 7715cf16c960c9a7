"""A start by least squares: the layers of a student are fitted to those of its teacher, one after another.

Layers behind a removed one get inputs that they do not know. Each layer of a U-Net (resnet, transformer, sampler, last)
ends in a linear map, so the weights of this map with the least squared error on some samples are the solution of linear
equations (as in channel pruning, arXiv 1707.06168, section 3.1). Each layer is fitted as it runs, in a single call of
the student with all samples, so it also corrects the error of those before it. The student's form does not change.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunet.console import progress
from prunet.data.cache import Cache
from prunet.denoisers.architecture import Net
from prunet.denoisers.form import teacher_name
from prunet.denoisers.taps import tap
from prunet.plan.derived import Derived
from prunet.recipe.stage import Stage
from prunet.teacher.teacher import Teacher
from prunet.training.samples import LiveSamples, Samples, batches

#: Samples: as many as have so many pixels of latents in all, but at least and at most so many.
PIXELS, LEAST, MOST = 2**18, 32, 256
CHUNK = 2**26  # numbers of patches that are in memory at once, or those of one sample: as float64 half a GiB
#: Added to the diagonal of the equations, as a share of its mean: weights of which the samples say nothing stay.
RIDGE = 0.1
#: Layers with a smaller relative error are not changed. In half precision the teacher's rounding alone is larger.
EQUAL, EQUAL_IN_HALF = 1e-9, 1e-3
#: The linear maps that end a layer.
Ends: TypeAlias = Sequence[nn.Linear | nn.Conv2d]


def samples_for(height: int, width: int) -> int:
    """Returns the number of samples that layers are fitted to, for latents of this size."""
    return max(LEAST, min(MOST, PIXELS // (height * width)))


@torch.no_grad()
def fit(teacher: Teacher, student: Net, derived: Derived, cache: Cache, seed: int) -> Net:
    """Fits the layers of `student` to those of `teacher`, in place, on noised samples of `cache`.

    Returns the student, on the CPU.
    """
    net = teacher.unet.to(teacher.device)
    nn.Module.to(student, teacher.device)
    height, width = cache.latent_size
    how = Stage(steps=1, batch_size=samples_for(height, width))
    samples = Samples(cache, how, seed, teacher.process) if cache.has_text else LiveSamples(cache, how, seed, teacher)
    batch = next(batches(samples, 0, how.batch_size))
    layers = _layers(student, derived)
    origins = [net.get_submodule(teacher_name(name, derived.form.module_map)) for name in layers]
    with tap(origins, "cpu") as theirs:  # for 64 samples of SD v1 they take 7 GB in fp32
        _call(teacher, net, batch)
        targets = dict(zip(layers, theirs.take(), strict=True))
    del net, origins
    teacher.release(teacher.architecture.part)  # so that the device holds one denoiser
    with progress("Fitting layers", len(layers)) as bar, ExitStack() as hooks:
        for name, ends in layers.items():
            inputs: list[Tensor] = []
            for end in ends:
                hooks.callback(end.register_forward_pre_hook(partial(_note, inputs)).remove)
            layer = student.get_submodule(name)
            hooks.callback(layer.register_forward_hook(partial(_fit_layer, name, ends, inputs, targets, bar)).remove)
        _call(teacher, student, batch)
    return nn.Module.to(student, "cpu")


def _layers(student: Net, derived: Derived) -> dict[str, Ends]:
    """Maps the name of each layer to the linear maps that end it."""
    kinds, found = derived.architecture.ends, dict[str, list[Any]]()
    for name, module in student.named_modules():
        ends = [getattr(module, end, None) for end in kinds.get(type(module).__name__, ())]
        found[name] = [module] if name == derived.architecture.last_layer else [end for end in ends if end is not None]
    return {name: ends for name, ends in found.items() if ends}


def _call(teacher: Teacher, net: Net, batch: dict[str, Any]) -> None:
    """Calls a denoiser with a batch, in its own precision."""
    latents, noise, timestep = (batch[key] for key in ("latents", "noise", "timestep"))
    noisy = teacher.process.add_noise(latents, noise, timestep).to(teacher.device, net.dtype)
    condition = batch["condition"].to(teacher.device, net.dtype)
    teacher.architecture.call(net, noisy, timestep.to(teacher.device), condition)


def _note(inputs: list[Tensor], end: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0])


def _fit_layer(
    name: str,
    ends: Ends,
    inputs: list[Tensor],
    targets: dict[str, Tensor],
    bar: Any,
    layer: Any,
    args: Any,
    output: Any,
) -> Any:
    """Changes the maps `ends` of a layer so that its output is nearest to its target; returns its new output.

    A forward hook. `inputs`: those of `ends`. Inputs and target are dropped, so that their memory can be freed.
    """
    bar.advance()
    ours = output[0] if isinstance(output, tuple) else output
    target, inputs = targets.pop(name).to(ours.device), [inputs.pop(0) for _ in ends]
    equal = EQUAL if target.dtype == torch.float32 else EQUAL_IN_HALF
    rest = (target.to(ours) - ours) * getattr(layer, "output_scale_factor", 1.0)
    if rest.square().sum() <= equal * target.float().square().sum():
        return output
    changes = _solve(ends, inputs, rest)
    before = [end.forward(given) for end, given in zip(ends, inputs, strict=True)]
    for end, change in zip(ends, changes, strict=False):
        end.weight += change.T.reshape(end.weight.shape).to(end.weight)
    if (bias := ends[0].bias) is not None:
        bias += changes[-1][0].to(bias)
    for end, given, old in zip(ends, inputs, before, strict=True):
        rows = _rows(end.forward(given) - old) / getattr(layer, "output_scale_factor", 1.0)
        ours = ours + rows.unflatten(0, (len(ours), -1)).transpose(1, 2).reshape(ours.shape)
    return (ours, *output[1:]) if isinstance(output, tuple) else ours


def _solve(ends: Ends, inputs: Sequence[Tensor], rest: Tensor) -> tuple[Tensor, ...]:
    """Returns the change of each map's weights (K, C), and of the bias (1, C), that bring nearest to `rest`."""
    sizes = [end.weight[0].numel() for end in ends]
    where = torch.device("cpu") if rest.device.type == "mps" else rest.device  # mps has no float64
    left = torch.zeros(sum(sizes) + 1, sum(sizes) + 1, dtype=torch.float64, device=where)
    right = torch.zeros(sum(sizes) + 1, rest.shape[1], dtype=torch.float64, device=where)
    count = max(1, CHUNK // (len(left) * rest[0, 0].numel()))
    for start in range(0, len(rest), count):
        at = slice(start, start + count)
        parts = [_patches(end, given[at]) for end, given in zip(ends, inputs, strict=True)]
        known = torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1).to(where).double()
        left += known.T @ known
        right += known.T @ _rows(rest[at]).to(where).double()
    left.diagonal().add_(RIDGE * left.diagonal().mean())
    changes: tuple[Tensor, ...] = torch.linalg.solve(left, right).split([*sizes, 1])
    return changes


def _rows(features: Tensor) -> Tensor:
    """Returns features (B, C, h, w) or (B, n, C) as rows (N, C)."""
    return (features.flatten(2).transpose(1, 2) if features.ndim == 4 else features).flatten(0, 1)


def _patches(end: nn.Linear | nn.Conv2d, given: Tensor) -> Tensor:
    """Returns what a linear map multiplies with its weights, as rows (N, K)."""
    if not isinstance(end, nn.Conv2d):
        return _rows(given)
    pad: Any = end.padding
    return _rows(F.unfold(given, end.kernel_size, end.dilation, pad, end.stride).transpose(1, 2))
