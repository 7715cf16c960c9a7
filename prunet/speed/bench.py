"""How fast models draw: latency by part, throughput and peak memory, beside what their multiply-adds allow."""

import importlib.metadata
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from prunet.console import say
from prunet.denoisers.architecture import config_of
from prunet.denoisers.known import architecture_of
from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.intervals import Measure, bootstrap
from prunet.plan.derived import derive
from prunet.plan.plan import load_plan
from prunet.plan.size import macs_by_kind, size_of
from prunet.recipe.values import Drawing
from prunet.sampling.draw import Model, open_model
from prunet.sampling.made_for import drawing_of
from prunet.speed.clock import Call, denoiser_call, device_name, seconds_of, times_in_turn, weights_mb, working_mb
from prunet.speed.profiling import times_by_kind
from prunet.student.student import inherit
from prunet.teacher.space import check_size
from prunet.words import names_of

PROMPT = "a photograph of an astronaut riding a horse"
Key = tuple[str, str, int]  # model, part or mode, batch size


@dataclass(frozen=True)
class Row:
    """One model at one batch size, with its denoiser `eager` or `compiled`.

    - `text_ms`: encoding the prompts of the batch, and the empty ones that guidance needs.
    - `denoiser_ms`: a call with 2 x `batch_size` latents, or with `batch_size` if the model draws without guidance.
    - `vae_ms`: decoding the batch. `seconds`: text, all steps, and VAE.
    - `peak_memory_mb`: the weights of all parts, and the most that a call of one part needs beside them (MiB).
    - `compile_s`: the compiled denoiser's first call.
    - `speed_up`: how many times faster a denoiser call is than the baseline's in the same mode, with its 95 %
      `interval` over the repeats. `limit`: the baseline's multiply-adds over the model's, attention's matmuls included.
      `share`: `speed_up / limit`.
    - `kinds_ms`: the call by kind of operation; the kinds add up to `denoiser_ms`. `over_ms`: how much longer each kind
      takes than the baseline's time for it divided by `limit`.
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

    `rows`: inputs of the denoiser per picture, 2 with guidance.
    """

    parameters: int
    macs: dict[str, int]
    rows: int
    steps: int
    precision: str


class Bench(Value):
    """What `bench` found (`bench.json`). The baseline is the first of `models`, and its rows come first."""

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


def open_pipelines(
    models: Sequence[str],
    plans: Sequence[str] = (),
    *,
    size: int | None = None,
    config: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Opens the pipelines at `models` (see `open_model`), and the first one reduced by each of `plans`, by name.

    Raises:
        UserError: a model cannot be opened, is given twice, or cannot draw pictures of `size` pixels; or a plan does
            not fit the first model. All of this is checked before weights are loaded.
    """
    names = names_of(models)
    teachers = [open_model(Model(model, config, device, dtype)) for model in models]
    first = teachers[0]
    for teacher in teachers:
        check_size(teacher, size or first.native_size, "size")
        teacher.check_weights()
    left = {f"plan {plan}": derive(first.unet_config, load_plan(plan)) for plan in plans}
    pipelines = {name: teacher.pipeline() for name, teacher in zip(names, teachers, strict=True)}
    for name, derived in left.items():
        pipelines[name] = first.pipeline(unet=nn.Module.to(inherit(first.unet, derived), first.device, first.dtype))
    return pipelines


def drawings(models: Sequence[str], *, config: str | None = None, steps: int | None = None) -> dict[str, Drawing]:
    """Returns how to draw with each model, by name: as it was made for, else in 25 guided steps; `steps` if given."""
    opened = (open_model(Model(model, config)) for model in models)
    return dict(
        zip(
            names_of(models),
            (drawing_of(model, Drawing(), Drawing.given(steps=steps)) for model in opened),
            strict=True,
        )
    )


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
) -> Bench:
    """Times the parts of stock pipelines in turn, each on its device and in its precision.

    The first pipeline is the baseline of the others. `size` in pixels: by default the one that the baseline was trained
    at. `drawn`: how to draw with each model; a model that it lacks draws as the baseline does, which draws by default
    in `steps` guided steps. `compiled`: also times the denoisers under `torch.compile`.
    """
    first = next(iter(pipelines.values()))
    device = first.device
    config = config_of(first.unet)
    size = size or architecture_of(config).native_latent_size(config)[0] * first.vae_scale_factor
    latent_sizes = {name: (size // pipe.vae_scale_factor,) * 2 for name, pipe in pipelines.items()}
    macs = {name: macs_by_kind(config_of(pipe.unet), latent_sizes[name]) for name, pipe in pipelines.items()}
    usual = (drawn or {}).get(next(iter(pipelines)), Drawing(steps=steps))
    how = {name: (drawn or {}).get(name, usual) for name in pipelines}
    rows = {name: how[name].rows for name in pipelines}
    calls: dict[Key, Call] = {}
    for (name, pipe), batch in product(pipelines.items(), batch_sizes):
        calls |= _calls(name, pipe, batch, rows[name], latent_sizes[name], device)
    # A function of diffusers is compiled for every model and batch size; more than 8 would fall back to eager.
    limit: Any = torch._dynamo.config.patch(recompile_limit=len(calls)) if compiled else nullcontext()
    with limit:
        compile_s = _compile(pipelines, batch_sizes, rows, latent_sizes, calls) if compiled else {}
        say(f"Timing {len(calls)} calls in turn, up to {repeats} times")
        times = times_in_turn(calls, repeats, device)
        say("Memory and operations")
        working = {key: working_mb(call, device) for key, call in calls.items()}
        denoisers = {key: call for key, call in calls.items() if key[1] in ("eager", "compiled")}
        kinds = times_by_kind(denoisers, {key: statistics.median(times[key]) for key in denoisers}, device)
    weights = {name: sum(map(weights_mb, _modules(pipe))) for name, pipe in pipelines.items()}
    return Bench(
        device=device_name(device),
        size=size,
        repeats=min(map(len, times.values())),
        models={
            name: BenchModel(
                parameters=size_of(config_of(pipe.unet)).parameters,
                macs=macs[name],
                rows=rows[name],
                steps=how[name].steps,
                precision=str(pipe.unet.dtype).removeprefix("torch."),
            )
            for name, pipe in pipelines.items()
        },
        rows=_rows(times, working, kinds, compile_s, macs, weights, how),
        versions={name: importlib.metadata.version(name) for name in ("prunet", "torch", "diffusers")},
    )


def check_compiler(device: torch.device) -> None:
    """Compiles something small, so that a machine without a compiler is noticed before models are loaded.

    Raises:
        UserError: nothing can be compiled for `device`.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # dynamo's, the C++ compiler's, Triton's
        why = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"--compile: nothing can be compiled for {device} here ({why}): install a C++ compiler (g++), or leave "
            "it out"
        ) from error


def _modules(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _calls(
    name: str, pipe: Any, batch: int, rows: int, latent_size: tuple[int, int], device: torch.device
) -> dict[Key, Call]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, pipe.vae.config.latent_channels, *latent_size)
    latents = torch.randn(shape, generator=generator, device=device, dtype=pipe.vae.dtype)
    text = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": rows > 1}
    return {
        (name, "text", batch): partial(pipe.encode_prompt, [PROMPT] * batch, **text),
        (name, "eager", batch): denoiser_call(pipe.unet, rows * batch, latent_size=latent_size, device=device),
        (name, "vae", batch): partial(pipe.vae.decode, latents),
    }


def _compile(
    pipelines: Mapping[str, Any],
    batch_sizes: Sequence[int],
    rows: Mapping[str, int],
    latent_sizes: Mapping[str, tuple[int, int]],
    calls: dict[Key, Call],
) -> dict[Key, float]:
    """Adds the compiled denoisers to `calls`; returns the seconds of each one's first call."""
    seconds: dict[Key, float] = {}
    for (name, pipe), batch in product(pipelines.items(), batch_sizes):
        say(f"Compiling {name}, batch {batch}")
        net: Any = torch.compile(pipe.unet, dynamic=False)
        device = pipe.device
        key = (name, "compiled", batch)
        calls[key] = denoiser_call(net, rows[name] * batch, latent_size=latent_sizes[name], device=device)
        seconds[key] = seconds_of(calls[key], device)
    return seconds


def _rows(
    times: Mapping[Key, list[float]],
    working: Mapping[Key, float | None],
    kinds: Mapping[Key, dict[str, float]],
    compile_s: Mapping[Key, float],
    macs: Mapping[str, Mapping[str, int]],
    weights: Mapping[str, float],
    how: Mapping[str, Drawing],
) -> list[Row]:
    rows = []
    baseline = next(iter(macs))
    for key in sorted(kinds, key=lambda key: (key[2], key[1] == "compiled")):
        name, mode, batch = key
        text, denoiser, vae = (statistics.median(times[name, part, batch]) for part in ("text", mode, "vae"))
        seconds = (text + how[name].steps * denoiser + vae) / 1000
        beside = [needed for part in ("text", mode, "vae") if (needed := working[name, part, batch]) is not None]
        theirs = baseline, mode, batch
        gained = _speed_up(times[theirs], times[key])
        ours, base = (how[n].rows * sum(macs[n].values()) for n in (name, baseline))
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
                peak_memory_mb=weights[name] + max(beside) if beside else None,
                compile_s=compile_s.get(key),
                speed_up=gained.value,
                interval=(gained.low, gained.high),
                limit=limit,
                share=gained.value / limit,
                kinds_ms=kinds[key],
                over_ms={kind: ms - kinds[theirs][kind] / limit for kind, ms in kinds[key].items()},
            )
        )
    return rows


def _speed_up(slow: Sequence[float], fast: Sequence[float]) -> Measure:
    """Returns the ratio of two medians, with an interval; calls that took turns are resampled together."""
    a, b = np.asarray(slow), np.asarray(fast)
    return bootstrap(len(a), lambda which: np.median(a[which], axis=-1) / np.median(b[which], axis=-1))
