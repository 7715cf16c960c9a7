"""Teachers of the published sizes with random weights, made once for all sections, and steps of distillation."""

import gc
import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from distill_speed import matmul_flops, reference_loop
from full_size import random_module, random_pipeline
from small_models import make_pictures, make_pipeline

from on_gpu.results import Setting
from prunet import Derived, Runtime, Teacher, derive, distil, load_plan
from prunet.data.cache import Cache
from prunet.data.encoding import cache
from prunet.denoisers.pairs import Level
from prunet.denoisers.unet2d.form import make_unet
from prunet.recipe.recipe import Data, Losses, Stage
from prunet.training import session as training

#: Layout -> plan, level of the feature losses, the test's small model of that layout.
JOBS: dict[str, tuple[str, Level, str]] = {"sd-v1": ("bk-small", "block", "sd"), "sdxl": ("vega", "layer", "sdxl")}
PICTURES = 8


@dataclass(frozen=True)
class Speed:
    """Images a second, the growth of the device's peak memory, and the last loss."""

    images_per_s: float
    peak_gb: float
    loss: float | None = None

    def __str__(self) -> str:
        return f"{self.images_per_s:.1f} images/s, {self.peak_gb:.1f} GB"


class Job:
    """A teacher and a plan, the teacher's cache, and the two loops."""

    def __init__(self, layout: str, setting: Setting) -> None:
        plan, self.level, small = JOBS[layout]
        self.layout, self.setting, self.folder = layout, setting, setting.work / layout
        self.source = self.folder / "teacher"
        if not self.source.is_dir():
            if setting.smoke:
                make_pipeline(self.source, small)
            else:
                random_pipeline(self.source, layout, torch.float16, setting.device)
        self.runtime = Runtime(device=str(setting.device))
        self.teacher = Teacher(self.source, device=setting.device, dtype=self.runtime.dtype)
        self.size = self.teacher.native_size
        self.derived: Derived = derive(self.teacher.unet_config, load_plan(plan))
        self.pictures = self.folder / "pictures"
        if not self.pictures.is_dir():
            make_pictures(self.pictures, PICTURES, self.size)

    def cache(self) -> Cache:
        out = cache(self.teacher, Data(source=str(self.pictures), size=self.size), self.folder / "cache")
        self.teacher.release("vae", "text")
        return out

    def student(self, derived: Derived | None = None) -> torch.nn.Module:
        config = (derived or self.derived).student_config
        return random_module(lambda: make_unet(config), torch.float32, self.setting.device)

    @property
    def flops_per_image(self) -> float:
        """The operations of a step: forward passes of both models, and the student's backward pass, which costs two."""
        macs = [size.macs + size.attention_macs for size in (self.derived.teacher_size, self.derived.student_size)]
        return 2 * (macs[0] + 3 * macs[1])

    def matmul_peak(self) -> float:
        size = 512 if self.setting.smoke else 8192
        return matmul_flops(self.setting.device, self.runtime.dtype, size)

    def reference(self, batch: int, steps: int) -> Speed:
        """Runs the published scripts' loop, with their gradient checkpointing."""
        args = Namespace(steps=steps, size=self.size, reference_checkpointing=True)
        pictures = torch.rand(batch, 3, self.size, self.size) * 2 - 1
        pairs = self.derived.pairs(self.level)
        before = fresh(self.setting.device)
        captions = ["a cat"] * batch
        said = reference_loop(
            self.teacher, self.student(), pairs, pictures, captions, args, self.runtime, by_parts=False
        )
        return Speed(batch / said["seconds_per_step"], peak_gb(self.setting.device, before))

    def prunet(self, made: Cache, batch: int, steps: int, **options: Any) -> Speed:
        """Runs prunet's loop; the first `steps` steps warm up, as many more are timed. Writes no checkpoint."""
        runtime = Runtime(**{"device": str(self.setting.device), "micro_batch": batch, "log_every": steps, **options})
        stage = Stage(steps=2 * steps, batch_size=batch, warmup_steps=0, losses=Losses(level=self.level))
        folder = self.folder / "run"
        before = fresh(self.setting.device)
        with patch.object(training, "save", lambda *args, **given: None):
            distil(self.teacher, self.student(), self.derived.pairs(self.level), made, stage, folder, runtime=runtime)
        peak = peak_gb(self.setting.device, before)
        row = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        shutil.rmtree(folder)
        if options.get("teacher_8bit") or options.get("teacher_fp8"):
            self.teacher.release("unet")  # it is another one now
        return Speed(row["images_per_s"], peak, row["loss"])


def fresh(device: torch.device) -> int:
    """Frees unused memory and returns the bytes in use; `peak_gb` counts from here."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return 0


def peak_gb(device: torch.device, before: int) -> float:
    """Returns the peak memory of the device since `fresh`, with weights; 0 if the device does not count it."""
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9 if device.type == "cuda" else 0.0


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def work_folder(setting: Setting, name: str) -> Path:
    path = setting.work / name
    path.mkdir(parents=True, exist_ok=True)
    return path
