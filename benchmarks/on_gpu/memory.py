"""Section c: the memory of `prunet estimate` beside the measured peak, in five settings."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from on_gpu.models import Job, fresh, peak_gb, work_folder
from on_gpu.results import Result, Setting, failed
from prunet import Run, Runtime, distil
from prunet.recipe.recipe import Recipe
from prunet.runs.estimate import memory
from prunet.training import session as training

#: Plan, batch, micro-batch, level, and options of the runtime.
SETTINGS: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
    ("bk-small", 8, 8, "block", {}),
    ("bk-small", 16, 4, "layer", {}),
    ("bk-tiny", 16, 16, "block", {"gradient_checkpointing": True}),
    ("bk-base", 8, 8, "block", {"offload_ema": True}),
    ("bk-small", 4, 4, "block", {"precision": "no"}),
)


def results(setting: Setting) -> Iterator[Result]:
    job = Job("sd-v1", setting)
    job.cache()
    for plan, batch, micro, level, options in SETTINGS[2:3] if setting.smoke else SETTINGS:
        name = f"{plan}, batch {batch}, micro-batch {micro}, {level}, {options or 'plain'}"
        try:
            yield measured(name, job, plan, batch, micro, level, options)
        except Exception as error:
            yield failed(name, error)


def measured(name: str, job: Job, plan: str, batch: int, micro: int, level: str, options: dict[str, Any]) -> Result:
    """Returns the ratio of the estimate to the measured peak of three steps."""
    folder = work_folder(job.setting, "memory")
    stage = {"steps": 3, "batch_size": batch, "warmup_steps": 0, "losses": {"level": level}}
    value = {"teacher": str(job.source), "plan": plan, "stages": [stage], "sheet": {"every": 0}}
    value |= {"data": {"source": str(job.pictures), "size": job.size}, "cache": str(job.folder / "cache")}
    value |= {"evaluation": {"prompts": ["a cat"]}, "output": str(folder / "run")}
    device = job.setting.device
    runtime = Runtime(**{"device": str(device), "micro_batch": micro, "log_every": 3, **options})
    run = Run(Recipe.model_validate(value), runtime)
    parts = memory(run, 1)
    estimated = sum(parts.values()) / 1e9
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    fresh(device)
    with patch.object(training, "save", lambda *args, **given: None):
        distil(
            run.teacher,
            job.student(run.derived),
            run.pairs(1),
            job.cache(),
            run.recipe.stages[0],
            folder / "stage",
            runtime=runtime,
        )
    peak = peak_gb(device, before)
    run.teacher.release("unet")
    told = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
    note = f"estimated {estimated:.2f} GB ({told}), measured {peak:.2f} GB"
    if not peak:
        return Result(name, note=f"{note}: the device does not count")
    ratio = estimated / peak
    return Result(name, ratio, "of measured", goal="0.9 to 1.1", reached=0.9 <= ratio <= 1.1, note=note)
