"""Section e: the time of a distillation step: the kernels that take most, and the waits of the device."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from on_gpu.models import Job
from on_gpu.results import Result, Setting, goal
from prunet.plan.size import kind_of
from prunet.training import loop as training

TOP = 15
WARM, WATCHED = 2, 3


def results(setting: Setting) -> Iterator[Result]:
    job = Job("sd-v1", setting)
    made, cuda = job.cache(), setting.device.type == "cuda"
    batch = 4 if setting.smoke else 32
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # Each step begins with a call of `watch.step`: the first of them ends what was before the training.
    schedule = torch.profiler.schedule(wait=WARM, warmup=1, active=WATCHED, repeat=1)
    watch = profile(activities=activities, schedule=schedule)
    real = training.learning_rate_at

    def at_each_step(*given: Any) -> float:
        watch.step()
        return real(*given)

    with watch, patch.object(training, "learning_rate_at", at_each_step):
        job.prunet(made, batch, WARM + WATCHED)  # twice as many steps
    unwatched = job.prunet(made, batch, WATCHED)
    step_ms = 1000 * batch / unwatched.images_per_s
    events = [event for event in watch.events() or [] if (event.device_type.name == "CUDA") == cuda]
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[event.name] = times.get(event.name, 0.0) + spent / 1000 / WATCHED
        calls[event.name] = calls.get(event.name, 0) + 1
    times.pop("ProfilerStep*", None)
    busy = sum(times.values())
    yield Result("a step, not watched", step_ms, "ms", note=f"batch {batch}, {unwatched}")
    if cuda:
        yield goal(
            "share of the step in which the device is busy", busy / step_ms, 0.95, note=f"{busy:.1f} ms of kernels"
        )
    kinds: dict[str, float] = {}
    for name, ms in times.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    told = ", ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]))
    yield Result("by kind", busy, "ms a step", note=told)
    for name, ms in sorted(times.items(), key=lambda item: -item[1])[:TOP]:
        yield Result(
            f"`{name[:90]}`".replace("|", "/"), ms, "ms a step", note=f"{calls[name] / WATCHED:.0f} calls a step"
        )
