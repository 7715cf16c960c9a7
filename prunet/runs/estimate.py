"""Estimates the cost of a recipe: memory from shapes, hours from a few real steps with random weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from prunet import processes
from prunet.console import Bar, progress
from prunet.data.cache import BLOCK
from prunet.data.encoding import ENCODE_BATCH, draw_batch
from prunet.data.listing import source_paths
from prunet.data.paths import BLOCK as PATHS
from prunet.data.remote import Remote, marks
from prunet.data.sources import is_hub_id, picture_files, read_pictures
from prunet.denoisers.pairs import Pair
from prunet.plan.derived import Derived
from prunet.runs.disk import cache_bytes, checkpoint_bytes, is_live, known_samples, path_bytes, path_folders
from prunet.runs.run import Run
from prunet.runtime import Runtime
from prunet.speed.clock import denoiser_call, times_in_turn
from prunet.training.allocator import kept_memory
from prunet.training.checkpoints import trained_parameters
from prunet.training.fit import training_memory
from prunet.training.memory import step_memory
from prunet.training.probe import default_dtype, probe

STEPS = 2
FEW = 4  # samples of the first, small micro-batch that is timed
COUNTED = 10_000  # most pictures that are counted, because counting a shard reads it
QUICK_S = 5.0  # a larger batch, where an image takes less time, is timed if it takes no longer


@dataclass(frozen=True)
class Estimate:
    """What a run would cost.

    `steps`: `done` or `to do`. `cache_bytes_per_sample`: by part; `cache_bytes`: of all samples. `path_bytes`: of
    the teacher's paths. `checkpoint_bytes`: of the checkpoints that are still to be written. `memory_bytes`: the
    peak by part, and `total`, of the stage that needs most, whose micro-batch is `micro_batch`. `images`: how many
    training sees in all stages. `samples`: how many different ones there are (None: counted when they are read),
    `or_more`, or `about` so many. `drawing_hours`: of the teacher, for the latents of prompts and for paths that
    are not drawn yet (None: one path for each sample, and these are not counted).
    """

    steps: dict[str, str]
    cache_bytes_per_sample: dict[str, int]
    cache_bytes: int | None
    path_bytes: int | None
    checkpoint_bytes: int
    memory_bytes: dict[str, int]
    micro_batch: int
    timed_micro_batch: int
    images: int
    samples: int | None
    or_more: bool
    about: bool
    size: int
    native_size: int
    seconds_per_image: float
    text_seconds_per_image: float
    distil_hours: float
    drawing_hours: float | None


def estimate(this: Run) -> Estimate:
    """Returns the peak memory by part (of the stage that needs most) and the hours of all stages, on this device."""
    with progress("Simulating and timing training steps", 2 * len(this.recipe.stages)) as bar:
        return _estimate(this, bar)


def _estimate(this: Run, bar: Bar) -> Estimate:
    stages, found = this.recipe.stages, []
    for number in range(1, len(stages) + 1):
        found.append(memory(this, number))
        bar.advance()
    speeds: dict[tuple[Any, ...], tuple[float, int]] = {}
    text_s = text_seconds(this, min(this.micro_batch(1), ENCODE_BATCH)) if is_live(this) else 0.0
    seconds = 0.0
    for number, stage in enumerate(stages, 1):
        derived, micro, pairs = this.steps_down[number - 1], this.micro_batch(number), compared(this, number)
        key = (derived.plan.fingerprint, pairs, micro, stage.teacher_calls, stage.rank)
        if key not in speeds:
            speeds[key] = _timed(micro, partial(_step_seconds, this, number))
        seconds += (speeds[key][0] + text_s) * stage.steps * stage.batch_size
        bar.advance()
    images = sum(stage.steps * stage.batch_size for stage in stages)
    samples, how = count_samples(this)
    each = cache_bytes(this)
    most = max(found, key=lambda parts: sum(parts.values()))
    todo = this.todo()
    return Estimate(
        steps={name: "to do" if name in todo else "done" for name in this.step_names()},
        cache_bytes_per_sample=each,
        cache_bytes=sum(each.values()) * samples if samples else None,
        path_bytes=path_bytes(this, samples),
        checkpoint_bytes=checkpoint_bytes(this, todo),
        memory_bytes={**most, "total": sum(most.values())},
        micro_batch=this.micro_batch(1 + found.index(most)),
        timed_micro_batch=min(timed for _, timed in speeds.values()),
        images=images,
        samples=samples,
        or_more=how == "or more",
        about=how == "about",
        size=this.size,
        native_size=this.teacher.native_size,
        seconds_per_image=seconds / images,
        text_seconds_per_image=text_s,
        distil_hours=seconds / 3600,
        drawing_hours=drawing_hours(this, None if how == "or more" else samples),
    )


def _timed(most: int, seconds_of: Callable[[int], float]) -> tuple[float, int]:
    """Times a few images at once, then four times as many, up to `most`, while that is quick.

    Returns the seconds per image, and how many were timed at once. Few images at once take longer each.
    """
    count = min(most, FEW)
    seconds = seconds_of(count)
    while count < most and seconds * (more := min(most, 4 * count)) < QUICK_S:
        count, seconds = more, seconds_of(more)
    return seconds, count


def _step_seconds(this: Run, number: int, count: int) -> float:
    """Returns the seconds per image of a step of stage `number` with `count` images."""
    stage, derived = this.recipe.stages[number - 1], this.steps_down[number - 1]
    how = (this.runtime, stage.teacher_calls, stage.rank)
    return seconds_per_image(derived, compared(this, number), this.latent_size, count, *how)


def drawing_hours(this: Run, samples: int | None) -> float | None:
    """Returns the hours that the teacher draws latents and paths before training; None if their number is not known.

    Guidance takes two calls of the denoiser for each step and picture. Text encoders and the VAE are not counted.
    """
    if "cache" not in this.todo():
        return 0.0
    calls, data = 0, this.recipe.data
    if data.source is None and samples:
        left = sum(_undrawn(folder, samples, BLOCK) for folder in {folder for folder, _ in this.cache_specs})
        calls += left * data.steps * (2 if data.guidance_scale > 1 else 1)
    for folder, number in path_folders(this).items():
        stage = this.recipe.stages[number - 1]
        count = stage.paths or samples
        if count is None:
            return None
        calls += _undrawn(folder, count, PATHS) * stage.path_steps * 2
    if not calls:
        return 0.0
    seconds, _ = _timed(draw_batch(*this.latent_size), partial(call_seconds, this))
    return calls * seconds / 3600


def _undrawn(folder: Path, count: int, block: int) -> int:
    """Returns how many of `count` samples are not in a cache yet, which is written in blocks of `block`."""
    if (folder / "cache.json").is_file():
        return 0
    return max(0, count - block * len(list(folder.glob("shard-*.safetensors"))))


@torch.no_grad()
def call_seconds(this: Run, count: int) -> float:
    """Times a call of the teacher's denoiser, with random weights, on `count` latents; returns the seconds for each."""
    teacher, device = this.teacher, this.runtime.torch_device
    with device, default_dtype(this.runtime.dtype):
        net = teacher.architecture.make(teacher.unet_config).eval()
    half = this.runtime.mixed_precision != "no"
    with kept_memory(device), teacher.architecture.fast_attention([net], device, half=half):
        call = denoiser_call(net, count, latent_size=this.latent_size, device=device)
        (times,) = times_in_turn({"teacher": call}, STEPS, device).values()
    return sum(times) / len(times) / 1000 / count


def text_seconds(this: Run, count: int) -> float:
    """Times the text encoders, with random weights, on `count` captions at once; returns seconds per caption."""
    device, seconds = this.runtime.torch_device, 0.0
    for part in this.teacher.text_encoders:
        empty = this.teacher.empty(part)
        with device:
            model = type(empty)(empty.config).to(this.runtime.dtype).eval()
            ids = torch.zeros(count, empty.config.max_position_embeddings, dtype=torch.long)
        with torch.no_grad():
            for step in range(STEPS + 1):
                if step == 1:  # the first one warms up
                    start = time.perf_counter()
                model(ids, output_hidden_states=True)
                if device.type == "cuda":
                    torch.cuda.synchronize()
        seconds += time.perf_counter() - start
    return seconds / STEPS / count


def count_samples(this: Run) -> tuple[int | None, str]:
    """Returns the number of samples that the cache has or will have (None if unknown), and how exact it is.

    "" means exact, "or more" a lower limit, "about" an estimate: of files behind URLs only the first is counted, and
    the others are estimated by their sizes.
    """
    data = this.recipe.data
    if (known := known_samples(this)) is not None:
        return known, ""
    assert data.source is not None
    if isinstance(data.source, str) and is_hub_id(data.source):
        return None, ""
    columns: dict[str, Any] = {"image_column": data.image_column, "caption_column": data.caption_column}
    wanted = min(data.limit or COUNTED, COUNTED)
    if remote := [path for path in source_paths(data.source) if isinstance(path, Remote)]:
        (_, pictures), *_ = picture_files(remote[0].url, **columns)
        sizes = [size for _, size, _ in marks(remote)]
        count = round(sum(1 for _ in islice(pictures, wanted)) * sum(sizes) / max(1, sizes[0]))
        return min(count, data.limit or count) * data.views, "about"
    count = sum(1 for _ in islice(read_pictures(data.source, **columns), wanted))
    return count * data.views, "or more" if count == COUNTED != data.limit else ""


def compared(this: Run, number: int) -> tuple[Pair, ...]:
    """Returns the pairs of features that stage `number` compares; none if the feature loss has no weight."""
    return this.pairs(number) if this.recipe.stages[number - 1].losses.feature else ()


def memory(this: Run, number: int) -> dict[str, int]:
    """Returns the bytes of a stage by part; `activations` are the most that a step needs beside the other parts.

    `heap`: on a CPU, the holes in freed memory, and the kernels' own buffers. It does not follow from shapes; in two
    runs it was half of what a step allocates (benchmarks/2026-11-21-full-size.md).
    """
    derived, micro, stage = this.steps_down[number - 1], this.micro_batch(number), this.recipe.stages[number - 1]
    configs = derived.teacher_config, derived.student_config
    parts = training_memory(*configs, this.latent_size, micro, stage, this.runtime)
    activations = step_memory(
        *configs,
        compared(this, number),
        latent_size=this.latent_size,
        micro_batch=micro,
        accumulate=stage.batch_size // (micro * processes.count()),
        runtime=this.runtime,
        rank=stage.rank,
    )
    heap = (parts["gradients"] + activations) // 2 if this.runtime.torch_device.type == "cpu" else 0
    encoders = [this.teacher.empty(part) for part in this.teacher.text_encoders] if is_live(this) else []
    count = sum(parameter.numel() for encoder in encoders for parameter in encoder.parameters())
    text = {"text encoders": count * this.runtime.dtype.itemsize} if encoders else {}
    return {**parts, "activations": activations, "heap": heap, **text}


def seconds_per_image(
    derived: Derived,
    pairs: Sequence[Pair],
    latent_size: tuple[int, int],
    batch_size: int,
    runtime: Runtime,
    teacher_calls: int = 1,
    rank: int | None = None,
) -> float:
    """Times a few distillation steps (teacher, student forward and backward, optimizer); returns seconds per image."""
    device, half = runtime.torch_device, runtime.mixed_precision != "no"
    configs = (derived.teacher_config, derived.student_config)
    setting: dict[str, Any] = {"shape": (batch_size, *latent_size), "rank": rank, "dtype": runtime.dtype}
    setting |= {"gradient_checkpointing": runtime.gradient_checkpointing, "device": device}
    with (
        kept_memory(device),
        probe(*configs, pairs, **setting) as (teacher, student, loss),
        derived.architecture.fast_attention([teacher, student], device, half=half),
    ):
        trained = list(trained_parameters(student).values())
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        for step in range(STEPS + 1):
            if step == 1:  # the first step warms up
                start = time.perf_counter()
            loss(teacher_calls).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS / batch_size
