"""Paths: the teacher's guided trajectories from noise to picture, in a cache, for trajectory regression.

A sample is `path` (steps + 1, C, h, w), from pure noise to the clean latents, with its condition: a caption from the
cache of latents, and the sizes that a pipeline gives when it draws.
"""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunet import processes
from prunet.console import progress
from prunet.data.cache import Cache, Sample, block_path, read_spec
from prunet.data.encoding import draw_batch, finish_cache, write_block
from prunet.denoisers.condition import Condition
from prunet.disk.files import write_json
from prunet.disk.ownership import check_place, hold
from prunet.errors import UserError
from prunet.hashing import seed_of
from prunet.recipe.stage import Stage
from prunet.sampling.paths import SAMPLER, draw_path, schedule_of
from prunet.teacher.teacher import Teacher

BLOCK = 64  # samples; fewer than in a cache of latents, because a path is many latents


def paths_spec(teacher: Teacher, latents: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Returns everything that a cache of paths depends on: the latents' spec, the U-Net, and how it draws."""
    how = {"guidance_scale": stage.guidance_scale, "steps": stage.path_steps, "count": stage.paths}
    return {
        **latents,
        "parts": {**latents["parts"], "unet": teacher.fingerprint(["unet"])},
        "paths": {**how, "sampler": SAMPLER, "schedule": schedule_of(teacher)},
    }


def cache_paths(teacher: Teacher, latents: Cache, stage: Stage, folder: Path | str) -> Cache:
    """Draws the paths of a stage for the captions in `latents` into `folder`; resumes where it was stopped.

    Several processes divide the blocks among them.

    Raises:
        UserError: the folder has other paths, the teacher's latents are not finite, or no space is left.
    """
    folder = Path(folder)
    processes.join(teacher.device)
    spec = paths_spec(teacher, latents.spec, stage)
    if (folder / "spec.json").is_file():
        check_paths(folder, spec)
        if (folder / "cache.json").is_file():
            return Cache.open(folder)
    processes.from_main(lambda: check_place(folder, "cache", "cache"))
    with hold(folder, "cache") if processes.is_main() else nullcontext():
        processes.from_main(lambda: _begin(teacher, latents, folder, spec))
        starts = range(0, stage.paths or len(latents), BLOCK)
        half = teacher.dtype != torch.float32
        with (
            teacher.architecture.fast_attention([teacher.unet], teacher.device, half=half),
            progress("Drawing the teacher's paths", stage.paths or len(latents)) as bar,
        ):
            for block, start in enumerate(starts):
                numbers = range(start, min(start + BLOCK, stage.paths or len(latents)))
                if processes.is_mine(block) and not block_path(folder, block).is_file():
                    _draw_block(teacher, latents, stage, block_path(folder, block), numbers)
                bar.advance(len(numbers))
        processes.from_main(lambda: finish_cache(folder, len(starts)))
    return Cache.open(folder)


def check_paths(folder: Path, spec: dict[str, Any]) -> None:
    """Refuses a folder with other paths than those of `spec`.

    Raises:
        UserError: the folder has other paths; the message names the keys that differ.
    """
    found = read_spec(folder)
    apart = sorted(key for key in spec if found.get(key) != spec[key])
    if apart == ["paths"] and isinstance(found.get("paths"), dict):
        apart = sorted(key for key in spec["paths"] if found["paths"].get(key) != spec["paths"][key])
    if apart:
        raise UserError(
            f"{folder}: paths of another {', '.join(apart)}: delete it, or give another folder with 'cache:'"
        )


def _begin(teacher: Teacher, latents: Cache, folder: Path, spec: dict[str, Any]) -> None:
    write_json(folder / "spec.json", spec)
    write_block(folder / "unconditional.safetensors", latents.unconditional, {}, ["the empty prompt"], teacher)


def _draw_block(teacher: Teacher, latents: Cache, stage: Stage, path: Path, numbers: range) -> None:
    samples = {number: latents.sample(_caption_of(latents, number)) for number in numbers}

    def size(number: int) -> tuple[int, ...]:
        return tuple(samples[number].mean.shape)

    drawn: dict[int, dict[str, Tensor]] = {}
    for _, same in itertools.groupby(sorted(numbers, key=size), key=size):
        group = list(same)
        at_once = draw_batch(*size(group[0])[-2:])
        for at in range(0, len(group), at_once):
            batch = group[at : at + at_once]
            drawn |= zip(batch, _draw_batch(teacher, latents, stage, batch, samples), strict=True)
    label: dict[str, Any] = {"captions": [], "skipped": [], "count": len(numbers)}
    tensors: dict[str, Tensor] = {}
    for name in drawn[numbers[0]]:
        rows = [drawn[number][name] for number in numbers]
        if name == "path" and len(latents.groups) > 1:
            tensors |= {f"path.{i}": row for i, row in enumerate(rows)}
            label["sizes"] = [tuple(row.shape[-2:]) for row in rows]
        else:
            tensors[name] = torch.stack(rows)
    write_block(path, tensors, label, [f"path {number}" for number in numbers], teacher)


def _caption_of(latents: Cache, number: int) -> int:
    """Returns the sample with the caption of path `number`: all samples in random order, then in another order, ..."""
    turn, place = divmod(number, len(latents))
    rng = torch.Generator().manual_seed(seed_of(latents.spec["seed"], "captions of paths", turn))
    return int(torch.randperm(len(latents), generator=rng)[place])


def _draw_batch(
    teacher: Teacher, latents: Cache, stage: Stage, numbers: list[int], samples: dict[int, Sample]
) -> list[dict[str, Tensor]]:
    """Draws the paths of `numbers`, with latents of one size and a random generator for each; adds the conditions."""
    shape = samples[numbers[0]].mean.shape
    rngs = [torch.Generator().manual_seed(seed_of(latents.spec["seed"], "path", number)) for number in numbers]
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
    height, width = (side * teacher.vae_scale for side in shape[-2:])
    rows = [samples[number].condition for number in numbers]
    condition = Condition({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    sizes = teacher.size_condition([(height, width, 0, 0, height, width)] * len(numbers))
    condition = Condition({**condition, **{name: value.cpu() for name, value in sizes.items()}})
    how = {"steps": stage.path_steps, "guidance_scale": stage.fixed_guidance}
    paths = draw_path(teacher, noise, condition, latents.unconditional, **how)  # type: ignore[arg-type]
    return [{"path": path, **condition.row(i)} for i, path in enumerate(paths)]
