"""Draws the pictures of an evaluation in batches, and keeps each on disk until the end: a stop loses at most one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunet import processes
from prunet.console import Bar
from prunet.denoisers.architecture import Net
from prunet.disk.files import new_file
from prunet.disk.seals import CHECKSUM, checksum
from prunet.hashing import hash_of
from prunet.recipe.values import Drawing
from prunet.sampling.draw import decode, draw_latents
from prunet.student.student import state_hash
from prunet.teacher.teacher import Teacher

#: Prompts in a batch; a batch always has the same prompts.
BATCH = 4

Drawn = tuple[Tensor, list[Image.Image]]


def batches(count: int) -> list[slice]:
    """Returns the batches of `count` prompts, as slices."""
    return [slice(start, start + BATCH) for start in range(0, count, BATCH)]


def draw_all(
    teacher: Teacher,
    net: Net,
    prompts: Sequence[str],
    how: Drawing,
    folder: Path,
    *,
    size: int,
    seed: int,
    bar: Bar,
) -> Drawn:
    """Draws all prompts, the i-th from seed + i, by `net` in the teacher's pipeline: latents (B, 4, h, w) and pictures.

    Batches that an earlier call drew from the same inputs are read from `folder`; the others are written there. Several
    processes divide the batches, and each process returns all of them.
    """
    settings: dict[str, Any] = {"size": size, "steps": how.steps, "guidance_scale": how.guidance_scale}
    settings |= {"scheduler": teacher.part_config("scheduler"), "zeros": teacher.zeros_for_empty_prompt}
    made_by = [teacher.fingerprint(), state_hash(net), str(teacher.dtype), how.sampler, settings]
    pipe: Any = None
    mine = []
    for rows in batches(len(prompts)):
        texts, seeds = list(prompts[rows]), list(range(seed, seed + len(prompts))[rows])
        if processes.is_mine(rows.start // BATCH):
            path = folder / f"{rows.start:05d}.safetensors"
            made_from = hash_of([json.dumps([*made_by, texts, seeds]).encode()])
            drawn = _read(path, made_from)
            if drawn is None:
                pipe = pipe or teacher.pipeline(unet=net)
                latents = draw_latents(pipe, texts, seeds, how, size=size)
                drawn = latents.cpu(), decode(pipe, latents)
                _write(path, made_from, drawn)
            mine.append((rows.start, *drawn))
        bar.advance(len(texts))
    found = processes.gather(mine)
    return torch.cat([latents for _, latents, _ in found]), [picture for _, _, row in found for picture in row]


def _write(path: Path, made_from: str, drawn: Drawn) -> None:
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in drawn[1]])
    tensors = {"latents": drawn[0].contiguous(), "pixels": pixels}
    with new_file(path) as part:
        save_file(tensors, part, metadata={"made_from": made_from, CHECKSUM: _checksum(tensors)})


def _read(path: Path, made_from: str) -> Drawn | None:
    """Reads a batch that was drawn from these inputs; None if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            label, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("latents", "pixels")}
        if (label["made_from"], label[CHECKSUM]) != (made_from, _checksum(tensors)):
            return None
    except Exception:  # safetensors raises errors of many kinds for a damaged file
        return None
    return tensors["latents"], [Image.fromarray(pixels.numpy()) for pixels in tensors["pixels"]]


def _checksum(tensors: dict[str, Tensor]) -> str:
    return checksum(tensors[name].numpy() for name in ("latents", "pixels"))
