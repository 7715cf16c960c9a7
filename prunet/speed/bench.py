"""How fast models draw: latency by part, throughput and peak memory, beside the limit by multiply-adds."""

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunet.console import say
from prunet.denoisers.known import architecture_of
from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.intervals import Measure, bootstrap
from prunet.plan.size import macs_by_kind, size_of
from prunet.recipe.values import Drawing
from prunet.sampling.draw import Model
from prunet.sampling.pictures import picture_rmse
from prunet.speed.alone import draw_alone
from prunet.speed.clock import Call, denoiser_call, device_name, seconds_of, times_in_turn, working_mb
from prunet.speed.models import PROMPT, TimedModel, TorchModel
from prunet.speed.profiling import times_by_kind
from prunet.speed.sd_cpp import CppModel

Key = tuple[str, str, int]  # model, part or mode, batch size


@dataclass(frozen=True)
class Row:
    """One model at one batch size; `mode`: its denoiser `eager` or `compiled` in torch, or another runtime's name.

    - `text_ms`: encoding the prompts of the batch, and the empty prompts for guidance.
    - `denoiser_ms`: a call with 2 x `batch_size` latents, or with `batch_size` if `rows` is 1.
    - `vae_ms`: decoding the batch. `seconds`: text, all steps, and VAE.
    - `peak_memory_mb`: the weights of all parts, and the most memory that a call of one part needs beside them (MiB);
      only for torch.
    - `compile_s`: the compiled denoiser's first call.
    - `speed_up`: how many times faster a denoiser call is than the baseline's (in the same mode, if the baseline
      has it), with its 95 % `interval` over the repeats. `limit`: the baseline's multiply-adds divided by the model's,
      with attention's matmuls. `share`: `speed_up / limit`.
    - `kinds_ms`: the call by kind of operation; the kinds add up to `denoiser_ms`. `over_ms`: how much longer each kind
      takes than the baseline's time for it divided by `limit`. Both only for torch.
    """

    model: str
    mode: str
    batch_size: int
    text_ms: float
    denoiser_ms: float
    vae_ms: float
    seconds: float
    pictures_per_s: float
    peak_memory_mb: float | None
    compile_s: float | None
    speed_up: float
    interval: tuple[float, float]
    limit: float
    share: float
    kinds_ms: dict[str, float]
    over_ms: dict[str, float]


class BenchModel(Value):
    """A model that was timed: its parameters, multiply-adds of a call by kind, and how it draws.

    - `rows`: inputs of the denoiser per picture, 2 with guidance, unless it takes the scale as an input.
    - `weights_mb`: of all parts (MiB).
    - `process_mb`: the growth of a separate process that opens the model and draws a picture (MiB); of
      stable-diffusion.cpp, its peak.
    - `apart`: the distance of that picture from the one of the first model of torch with a U-Net of the same
      size, drawn in the same way from the same noise (root mean squared error, 0 to 1).
    """

    parameters: int
    macs: dict[str, int]
    rows: int
    steps: int
    precision: str
    runtime: str = "torch"
    weights_mb: float | None = None
    process_mb: float | None = None
    apart: float | None = None


class Bench(Value):
    """The result of `bench` (`bench.json`). The baseline is the first of `models`, and its rows come first."""

    device: str
    size: int
    repeats: int
    models: dict[str, BenchModel]
    rows: list[Row]
    versions: dict[str, str]

    @property
    def baseline(self) -> str:
        """The name of the first model."""
        return next(iter(self.models))


@torch.no_grad()
def bench(
    pipelines: Mapping[str, Any],
    *,
    size: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    drawn: Mapping[str, Drawing] | None = None,
    steps: int = 25,
    repeats: int = 15,
    compiled: bool = False,
    sources: Mapping[str, Model] | None = None,
) -> Bench:
    """Times the parts of stock pipelines, or of models from `open_models`, in turns, with their devices and precisions.

    Args:
        pipelines: models by name; the first is the baseline.
        size: in pixels; by default the size that the baseline was trained at.
        batch_sizes: pictures that are drawn at once.
        drawn: how each model draws; others draw like the baseline, and the baseline by default in `steps` guided steps.
        repeats: times that each call is timed, at most.
        compiled: also times the denoisers of torch under `torch.compile`.
        sources: models by the names of `pipelines`; each draws a picture in a separate process.
    """
    models: dict[str, TimedModel] = {
        name: TorchModel(pipe) if hasattr(pipe, "unet") else pipe for name, pipe in pipelines.items()
    }
    first = next(iter(models.values()))
    device = first.device
    size = size or architecture_of(first.config).native_latent_size(first.config)[0] * first.scale
    latent_sizes = {name: (size // model.scale,) * 2 for name, model in models.items()}
    usual = (drawn or {}).get(next(iter(models)), Drawing(steps=steps))
    how = {name: (drawn or {}).get(name, usual) for name in models}
    calls: dict[Key, Call] = {}
    for (name, model), batch in product(models.items(), batch_sizes):
        found = model.calls(batch, how[name].rows, latent_sizes[name])
        calls |= {(name, part, batch): call for part, call in found.items()}
    # A function of diffusers is compiled for every model and batch size; by default more than 8 fall back to eager.
    limit: Any = torch._dynamo.config.patch(recompile_limit=len(calls)) if compiled else nullcontext()
    with limit:
        compile_s = _compile(models, batch_sizes, how, latent_sizes, calls) if compiled else {}
        say(f"Timing {len(calls)} calls in turn, up to {repeats} times")
        times = times_in_turn(calls, repeats, device)
        repeats = min(map(len, times.values()))
        for name, model in models.items():
            if isinstance(model, CppModel):  # a program that times itself
                times |= {(name, part, 1): ms for part, ms in model.times(PROMPT, how[name], size).items()}
        say("Memory and operations")
        # Memory and operations of a call are known only for torch.
        seen = {key: call for key, call in calls.items() if isinstance(models[key[0]], TorchModel)}
        working = {key: working_mb(call, device) for key, call in seen.items()}
        medians = {key: statistics.median(found) for key, found in times.items() if key[1] not in ("text", "vae")}
        kinds = times_by_kind({key: call for key, call in seen.items() if key in medians}, medians, device)
        kinds = {key: kinds.get(key, {}) for key in medians}
    told = {name: _told(model, how[name], latent_sizes[name]) for name, model in models.items()}
    return Bench(
        device=device_name(device),
        size=size,
        repeats=repeats,
        models=_pictures(told, sources or {}, how, size),
        rows=_rows(times, working, kinds, compile_s, told),
        versions={name: importlib.metadata.version(name) for name in ("prunet", "torch", "diffusers")},
    )


def _told(model: TimedModel, how: Drawing, latent_size: tuple[int, int]) -> BenchModel:
    return BenchModel(
        parameters=size_of(model.config).parameters,
        macs=macs_by_kind(model.config, latent_size),
        rows=how.rows,
        steps=how.steps,
        precision=model.precision,
        runtime=model.runtime,
        weights_mb=model.weights_mb,
        process_mb=model.process_mb if isinstance(model, CppModel) else None,
    )


def _pictures(
    told: Mapping[str, BenchModel], sources: Mapping[str, Model], how: Mapping[str, Drawing], size: int
) -> dict[str, BenchModel]:
    """Draws a picture with each of `sources` in a separate process; returns the models with the results."""

    @cache
    def drawn(name: str, way: Drawing) -> tuple[Image.Image, float | None]:
        say(f"A picture of {name}")
        return draw_alone(sources[name], PROMPT, way, size)

    found = dict(told)
    for name in sources:
        ours, way = told[name], how[name]
        picture, process_mb = drawn(name, way)
        same = [other for other in sources if told[other].runtime == "torch" and _net(told[other]) == _net(ours)]
        apart = picture_rmse(drawn(same[0], way)[0], picture) if same and ours.runtime != "torch" else None
        found[name] = ours.model_copy(update={"process_mb": process_mb, "apart": apart})
    return found


def _net(model: BenchModel) -> tuple[int, dict[str, int]]:
    """Returns a value that differs for U-Nets of different plans."""
    return model.parameters, model.macs


def check_compiler(device: torch.device) -> None:
    """Compiles a small function, so that a missing compiler is noticed before models are loaded.

    Raises:
        UserError: nothing can be compiled for `device`.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # errors of dynamo, the C++ compiler or Triton
        why = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"--compile: nothing can be compiled for {device} here ({why}): install a C++ compiler (g++), or leave "
            "it out"
        ) from error


def _compile(
    models: Mapping[str, TimedModel],
    batch_sizes: Sequence[int],
    how: Mapping[str, Drawing],
    latent_sizes: Mapping[str, tuple[int, int]],
    calls: dict[Key, Call],
) -> dict[Key, float]:
    """Adds the compiled denoisers of torch to `calls`; returns the seconds of each one's first call."""
    seconds: dict[Key, float] = {}
    for (name, model), batch in product(models.items(), batch_sizes):
        if not isinstance(model, TorchModel):
            continue
        say(f"Compiling {name}, batch {batch}")
        net: Any = torch.compile(model.pipe.unet, dynamic=False)
        key, device = (name, "compiled", batch), model.device
        calls[key] = denoiser_call(net, how[name].rows * batch, latent_size=latent_sizes[name], device=device)
        seconds[key] = seconds_of(calls[key], device)
    return seconds


def _rows(
    times: Mapping[Key, list[float]],
    working: Mapping[Key, float | None],
    kinds: Mapping[Key, dict[str, float]],
    compile_s: Mapping[Key, float],
    models: Mapping[str, BenchModel],
) -> list[Row]:
    rows = []
    baseline = next(iter(models))
    plain = next(mode for name, mode, _ in kinds if name == baseline)
    for key in sorted(kinds, key=lambda key: (key[2], key[1] == "compiled")):
        name, mode, batch = key
        text, denoiser, vae = (statistics.median(times[name, part, batch]) for part in ("text", mode, "vae"))
        seconds = (text + models[name].steps * denoiser + vae) / 1000
        needed = [working.get((name, part, batch)) for part in ("text", mode, "vae")]
        beside = [mb for mb in needed if mb is not None]
        theirs = (baseline, mode, batch) if (baseline, mode, batch) in kinds else (baseline, plain, batch)
        gained = _speed_up(times[theirs], times[key])
        ours, base = (models[n].rows * sum(models[n].macs.values()) for n in (name, baseline))
        limit = base / ours
        rows.append(
            Row(
                model=name,
                mode=mode,
                batch_size=batch,
                text_ms=text,
                denoiser_ms=denoiser,
                vae_ms=vae,
                seconds=seconds,
                pictures_per_s=batch / seconds,
                peak_memory_mb=(models[name].weights_mb or 0) + max(beside) if beside else None,
                compile_s=compile_s.get(key),
                speed_up=gained.value,
                interval=(gained.low, gained.high),
                limit=limit,
                share=gained.value / limit,
                kinds_ms=kinds[key],
                over_ms={kind: ms - kinds[theirs][kind] / limit for kind, ms in kinds[key].items() if kinds[theirs]},
            )
        )
    return rows


def _speed_up(slow: Sequence[float], fast: Sequence[float]) -> Measure:
    """Returns the ratio of two medians, with an interval; calls that took turns are resampled together."""
    a, b = (np.asarray(times[: min(len(slow), len(fast))]) for times in (slow, fast))
    return bootstrap(len(a), lambda which: np.median(a[which], axis=-1) / np.median(b[which], axis=-1))
