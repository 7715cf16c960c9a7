"""Examples: inputs of the denoiser on which the error of a removal is measured."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunet.console import progress
from prunet.data.cache import Cache
from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.disk.files import new_file
from prunet.errors import UserError
from prunet.hashing import seed_of
from prunet.recipe.prompts import prompts_hash
from prunet.sampling.paths import SAMPLER, draw_path, schedule_of
from prunet.sampling.samplers import sampler_of
from prunet.teacher.guidance import guided
from prunet.teacher.teacher import Teacher
from prunet.words import difference

#: Prompts to draw if the user gives no prompts and no cache.
PROMPTS = (
    "a red fox in the snow",
    "a bowl of fruit on a wooden table",
    "portrait of an old sailor",
    "a castle on a hill at sunset, oil painting",
    "a yellow taxi in the rain",
    "a smiling sun with sunglasses",
    "two cats on a sofa",
    "a bicycle against a blue wall",
    "a spaceship over a desert",
    "a birthday cake with candles",
    "a mountain lake in autumn",
    "a robot playing the violin",
    "a street market at night",
    "a green parrot, watercolour",
    "an open book and a cup of tea",
    "a football on the grass",
)
STEPS, POINTS = 12, 4  # steps of a path; examples taken from each path
GUIDANCE = 7.5  # guidance scale of the paths, and of the outputs that are compared, if none is given
MOST, RANDOM, BATCH = 64, 16, 8  # examples from a cache; random examples; examples at once


@dataclass(frozen=True)
class Examples:
    """Calls of a denoiser.

    `calls`: each returns the output (b, ...) of a model for some examples. `groups`: for each example the number of its
    prompt or picture; intervals are over these. `source`: a description of where they are from; `label`: everything
    that they depend on, as plain JSON types.
    """

    calls: Sequence[Callable[[Net], Tensor]]
    groups: Sequence[int]
    source: str
    label: dict[str, Any]


def path_examples(
    teacher: Teacher, prompts: Sequence[str] | None, file: Path | None = None, guidance_scale: float = GUIDANCE
) -> Examples:
    """Makes examples from the paths on which the teacher draws `prompts` with guidance, at all noise levels.

    The output is the guided one, because the prompt hardly changes the plain output. `file`: where the examples are
    kept, so that they are drawn only once.

    Raises:
        UserError: the file has examples of other prompts, another guidance scale or another teacher.
    """
    prompts = list(prompts or PROMPTS)
    teacher.check_prompts(prompts)
    label: dict[str, Any] = {"prompts": prompts_hash(prompts), "steps": STEPS, "points": POINTS}
    label |= {"guidance": guidance_scale, "schedule": schedule_of(teacher), "pipeline": teacher.fingerprint()}
    made_from = {**label, "precision": str(teacher.dtype)}
    known = _made_from(file) if file is not None else None
    if apart := known and difference(made_from | known, made_from):
        raise UserError(f"{file}: examples of another search: {apart}: give another folder, or delete it")
    if file is not None and known == made_from:
        tensors = load_file(file)
    else:
        tensors = _draw(teacher, prompts, guidance_scale)
        if file is not None:
            with new_file(file) as part:
                save_file(tensors, part, {"made_from": json.dumps(made_from)})
    teacher.release("text")
    source = f"{len(prompts)} prompts drawn by the teacher, {POINTS} points of each path"
    return _examples(teacher, tensors, source, label, guidance_scale)


def _made_from(file: Path) -> dict[str, Any] | None:
    """Returns what the examples in a file were drawn from; None if the file is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = json.loads((opened.metadata() or {}).get("made_from", "null"))
            return found if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError, SafetensorError):
        return None


def _draw(teacher: Teacher, prompts: Sequence[str], guidance_scale: float) -> dict[str, Tensor]:
    """Draws `noisy` (N, C, h, w), `timestep` (N,), `group` (N,), the condition of N examples and that of no prompt."""
    side = teacher.native_size
    shape = (teacher.part_config("vae").get("latent_channels", 4), *(side // teacher.vae_scale,) * 2)
    empty = Condition(teacher.encode_prompts([""], unconditional=True)).to("cpu", torch.float32)
    scheduler = sampler_of(SAMPLER, schedule_of(teacher))
    scheduler.set_timesteps(STEPS)
    rows: list[dict[str, Tensor]] = []
    with progress("Drawing examples", len(prompts)) as bar:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            sizes = teacher.size_condition([(side, side, 0, 0, side, side)] * len(batch))
            condition = Condition(teacher.encode_prompts(batch) | sizes).to("cpu", torch.float32)
            numbers = range(start, start + len(batch))
            noise = torch.stack(
                [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of("example", i))) for i in numbers]
            )
            paths = draw_path(teacher, noise, condition, empty, steps=STEPS, guidance_scale=guidance_scale)
            for place, number in enumerate(numbers):
                for point in range(POINTS):
                    at = point * STEPS // POINTS + number % (STEPS // POINTS)
                    step = {"noisy": paths[place, at], "timestep": scheduler.timesteps[at].float()}
                    rows.append({**step, "group": torch.tensor(number), **condition.row(place)})
            bar.advance(len(batch))
    return _stacked(rows, empty)


def _stacked(rows: Sequence[dict[str, Tensor]], empty: Condition) -> dict[str, Tensor]:
    tensors = {name: torch.stack([row[name] for row in rows]).contiguous() for name in rows[0]}
    return tensors | {f"empty.{name}": tensor for name, tensor in empty.items()}


def cache_examples(teacher: Teacher, cache: Cache, guidance_scale: float = GUIDANCE) -> Examples:
    """Makes examples from the pictures of a cache, noised to all noise levels; the output is the guided one.

    Raises:
        UserError: the cache is of another teacher.
    """
    cache.check(teacher)
    group = max(cache.groups, key=len)  # all latents must have one size
    count = min(MOST, len(group))
    stride = 31 if count % 29 == 0 else 29  # a prime that does not divide the count, so that each level comes once
    process, rows = teacher.process, []
    for number in range(count):
        sample = cache.sample(group[number * len(group) // count])
        rng = torch.Generator().manual_seed(seed_of("example", number))
        timestep = torch.tensor(process.timestep_at((number * stride % count + 0.5) / count))
        noise = torch.randn(sample.mean.shape, generator=rng)
        noisy = process.add_noise(sample.mean[None], noise[None], timestep[None])[0]
        rows.append({"noisy": noisy, "timestep": timestep.float(), "group": torch.tensor(number), **sample.condition})
    source = f"{count} samples of the cache in {cache.folder}"
    label = {"cache": cache.spec, "guidance": guidance_scale, "schedule": schedule_of(teacher)}
    return _examples(teacher, _stacked(rows, cache.unconditional), source, label, guidance_scale)


def _examples(
    teacher: Teacher, tensors: dict[str, Tensor], source: str, label: dict[str, Any], guidance_scale: float
) -> Examples:
    empty = Condition({name.removeprefix("empty."): t for name, t in tensors.items() if name.startswith("empty.")})
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith("empty.")}
    noisy, timestep, groups = named.pop("noisy"), named.pop("timestep"), named.pop("group").tolist()
    device, dtype, call = teacher.device, teacher.dtype, teacher.architecture.call

    def rows(start: int) -> Callable[[Net], Tensor]:
        at = slice(start, start + BATCH)
        condition = Condition({name: tensor[at] for name, tensor in named.items()})

        def give(net: Net) -> Tensor:
            step = noisy[at].to(device, dtype), timestep[at].to(device)
            return guided(call, net, *step, condition.to(device, dtype), empty.to(device, dtype), guidance_scale)

        return give

    return Examples(
        [rows(start) for start in range(0, len(groups), BATCH)], groups, source, {**label, "output": "guided"}
    )


def noise_examples(teacher: Teacher) -> Examples:
    """Makes random examples, for denoisers that prunet cannot draw with: their errors are a first guess."""
    architecture, config = teacher.architecture, teacher.unet_config

    def call(number: int) -> Callable[[Net], Tensor]:
        def give(net: Net) -> Tensor:
            inputs = architecture.example_inputs(config, device=teacher.device, dtype=teacher.dtype)
            _fill(inputs, torch.Generator().manual_seed(seed_of("example", number)))
            out = net(**inputs, return_dict=False)[0]
            return torch.stack(out) if isinstance(out, list) else out

        return give

    calls = [call(number) for number in range(RANDOM)]
    source = f"{RANDOM} random inputs, since prunet cannot draw with it yet: a first guess"
    return Examples(calls, range(RANDOM), source, {"random": RANDOM, "times": "of the pipeline"})


def _fill(value: Any, rng: torch.Generator) -> None:
    """Fills an example with random numbers, but for positions; a single number per sample is from 0 to what it was."""
    if isinstance(value, Tensor) and value.is_floating_point():
        shares = torch.rand(value.shape, generator=rng).to(value)
        value.copy_(value * shares if value.ndim == 1 else torch.randn(value.shape, generator=rng))
    elif isinstance(value, dict):
        for name, inside in value.items():
            if not name.endswith("_ids"):
                _fill(inside, rng)
    elif isinstance(value, list):
        for inside in value:
            _fill(inside, rng)
