"""Section d: how fast teacher and students draw, eager and compiled, beside the limit of their multiply-adds."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from full_size import random_module, random_pipe
from small_models import make_pipeline

from on_gpu.results import Result, Setting, goal
from prunet import Runtime, Teacher, derive, load_plan
from prunet.denoisers.unet2d.form import make_unet
from prunet.speed.bench import Bench, bench
from prunet.speed.clock import wait
from prunet.speed.models import PROMPT

PLANS = ("bk-base", "bk-small", "bk-tiny")


def results(setting: Setting) -> Iterator[Result]:
    dtype = torch.float32 if setting.smoke else Runtime(device=str(setting.device)).dtype
    pipelines = _pipelines(setting, dtype)
    repeats = 3 if setting.smoke else 15
    if not setting.smoke:  # what is compiled below is timed eager, too
        yield from _rows(bench(pipelines, batch_sizes=(1, 4), repeats=repeats), setting)
    yield from _pictures(pipelines, setting)
    teacher = next(iter(pipelines))
    for plan in reversed(PLANS):  # one after the other, so that the first is there when time is up
        if plan not in pipelines:
            continue
        two = {name: pipelines[name] for name in (teacher, plan)}
        yield from _rows(bench(two, batch_sizes=(1,), repeats=repeats, compiled=True), setting, "compiled")


def _pipelines(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    if setting.smoke:
        first: Any = Teacher(
            make_pipeline(setting.work / "inference", "sd"), device=setting.device, dtype=dtype
        ).pipeline()
    else:
        first = random_pipe("sd-v1", dtype, setting.device)
    first.set_progress_bar_config(disable=True)
    pipelines = {"SD v1.4": first}
    layout = {key: value for key, value in first.unet.config.items() if not key.startswith("_")}
    for plan in PLANS[-1:] if setting.smoke else PLANS:
        config = derive(layout, load_plan(plan)).student_config
        student = random_module(lambda config=config: make_unet(config), dtype, setting.device)
        pipelines[plan] = type(first)(**{**first.components, "unet": student}, requires_safety_checker=False)
        pipelines[plan].set_progress_bar_config(disable=True)
    return pipelines


def _rows(said: Bench, setting: Setting, mode: str = "eager") -> Iterator[Result]:
    teacher = said.baseline
    for row in said.rows:
        if row.mode != mode:
            continue
        name = f"{row.model}, {mode}, batch {row.batch_size}"
        parts = f"denoiser {row.denoiser_ms:.1f} ms, text {row.text_ms:.1f}, VAE {row.vae_ms:.1f}; "
        memory = f"{row.peak_memory_mb:.0f} MB" if row.peak_memory_mb else "memory not told"
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row.kinds_ms.items() if ms >= 0.1)
        yield Result(name, row.pictures_per_s, "pictures/s at 25 steps", note=f"{parts}{memory}; {kinds}")
        if row.model != teacher:
            note = f"{row.speed_up:.2f} times, of {row.limit:.2f} that the MACs allow"
            yield goal(f"{name}: share of what its MACs allow", row.share, 0.95, note=note, meant=not setting.smoke)


def _pictures(pipelines: dict[str, Any], setting: Setting) -> Iterator[Result]:
    """Times the whole pipeline from prompt to picture: the median of three, after one that warms up."""
    for name in list(pipelines)[:1] if setting.smoke else pipelines:
        for steps in (1,) if setting.smoke else (1, 4, 25):
            times = []
            for _ in range(4):
                wait(setting.device)
                start = time.perf_counter()
                pipelines[name](PROMPT, num_inference_steps=steps, guidance_scale=7.5, output_type="np")
                wait(setting.device)
                times.append(time.perf_counter() - start)
            yield Result(f"{name}, eager: a picture in {steps} guided steps", statistics.median(times[1:]), "s")
