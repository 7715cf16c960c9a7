"""Section a: the numbers equal those on a CPU, in every precision and with every fast option.

Small models of the SD and SDXL layouts. The yardstick of each check is the CPU's fp32 run from the same seeds.
"""

import dataclasses
import gc
import importlib.util
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from small_models import make_pictures, make_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

import prunet
from on_gpu.results import Result, Setting, check, failed
from prunet import Runtime, Teacher, build, derive, distil, load_plan
from prunet.data.cache import Cache
from prunet.data.encoding import cache
from prunet.denoisers.unet2d.inputs import example_inputs
from prunet.recipe.recipe import Data, Losses, Stage
from prunet.speed.clock import working_mb
from prunet.student.student import state_hash
from prunet.training import session as training
from prunet.training.checkpoints import Saving
from prunet.training.losses import mse

EMOJI = Path(__file__).parents[2] / "emoji" / "emoji-sd"
PLANS = {"sd": "bk-small", "sdxl": "vega"}
STAGE = Stage(steps=4, batch_size=2, learning_rate=1e-3, warmup_steps=0, ema_decay=0.9, losses=Losses(level="layer"))
#: Largest relative difference of a step's loss and its parts from the CPU's in fp32. Rounding units are 1e-7, 4e-3
#: (bf16) and 5e-4 (fp16); small random models make them some ten times larger.
TOLERANCE = {"no": 1e-3, "bf16": 4e-2, "fp16": 1e-2}


def results(setting: Setting) -> Iterator[Result]:
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to be compared with fp32
    made = {kind: Made(kind, setting) for kind in PLANS}
    yield from _steps(made, setting)
    yield from _losses(setting)
    yield from _attention(setting)
    yield from _interrupted(made["sd"], setting)
    yield from _pictures(setting)
    yield from _counters(setting)
    yield from _options(made["sd"], setting)


class Made:
    """A teacher of one layout, its cache, and distillations that start from the same student."""

    def __init__(self, kind: str, setting: Setting) -> None:
        self.kind, self.plan = kind, load_plan(PLANS[kind])
        self.setting, self.folder = setting, setting.work / f"correctness-{kind}"
        self.teacher = make_pipeline(self.folder / "teacher", kind)
        pictures = make_pictures(self.folder / "pictures")
        self.cache: Cache = cache(
            Teacher(self.teacher), Data.model_validate({"source": str(pictures)}), self.folder / "cache", seed=1
        )
        self.runs = 0

    def runtime(self, **options: Any) -> Runtime:
        return Runtime(**{"device": str(self.setting.device), "precision": "no", "log_every": 1, **options})

    def train(
        self, runtime: Runtime, folder: Path | None = None, **stage: Any
    ) -> tuple[list[dict], UNet2DConditionModel]:
        """Distils; returns the rows of the log, and the student."""
        self.runs += 1
        folder = folder or self.folder / f"run-{self.runs}"
        teacher = Teacher(self.teacher, device=runtime.torch_device, dtype=runtime.dtype)
        student = build(Teacher(self.teacher), self.plan)
        pairs = derive(teacher.unet_config, self.plan).pairs("layer")
        settings = STAGE.model_copy(update=stage)
        out = distil(teacher, student, pairs, self.cache, settings, folder, seed=5, runtime=runtime, saving=Saving(2))
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()], out


def apart(rows: list[dict], others: list[dict]) -> float:
    """Returns the largest relative difference of the loss and its three terms over all steps."""
    names = ("loss", "task", "output", "feature")
    return max(abs(a[n] - b[n]) / abs(b[n]) for a, b in zip(rows, others, strict=True) for n in names)


def tried(name: str, make: Callable[[], Result]) -> Result:
    """Runs a check; an exception is its result."""
    try:
        return make()
    except Exception as error:
        return failed(name, error)
    finally:
        gc.collect()


def _steps(made: dict[str, Made], setting: Setting) -> Iterator[Result]:
    precisions = ["no", "bf16", *(["fp16"] if setting.device.type == "cuda" else [])]
    for kind, these in made.items():
        yardstick, _ = these.train(these.runtime(device="cpu"))
        for precision in precisions:
            name = f"{kind}: {STAGE.steps} steps in {precision}, against the CPU's in fp32"

            def compared(these=these, precision=precision, name=name, yardstick=yardstick) -> Result:
                rows, _ = these.train(these.runtime(precision=precision))
                # The scaler of fp16 may skip the first steps, so learning is compared in the loss after more steps.
                both = (rows[:1], yardstick[:1]) if precision == "fp16" else (rows, yardstick)
                return check(name, apart(*both), TOLERANCE[precision])

            yield tried(name, compared)
    if "fp16" in precisions:

        def learns() -> Result:
            rows, _ = made["sd"].train(made["sd"].runtime(precision="fp16"), steps=40, learning_rate=3e-3)
            first, last = (sum(row["feature"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
            return check("sd: fp16 with its scaler learns: feature loss after 40 steps", last / first, 0.7)

        yield tried("fp16 learns", learns)


def _losses(setting: Setting) -> Iterator[Result]:
    """Compares the gradient of prunet's own MSE with autograd's in fp64, at a loss scale of fp16."""
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)):
        name = f"gradient of the MSE in {str(dtype).removeprefix('torch.')}, against fp64"

        def compared(dtype=dtype, most=most, name=name) -> Result:
            generator = torch.Generator(setting.device).manual_seed(0)
            a, b = (torch.randn(4, 64, 32, 32, device=setting.device, generator=generator).to(dtype) for _ in range(2))
            ours, plain = a.clone().requires_grad_(), a.double().requires_grad_()
            scale = 65536.0
            (mse(ours, b) * scale).backward()
            (F.mse_loss(plain, b.double()) * scale).backward()
            assert ours.grad is not None and plain.grad is not None
            return check(name, ((ours.grad.double() - plain.grad).norm() / plain.grad.norm()).item(), most)

        yield tried(name, compared)


def _attention(setting: Setting) -> Iterator[Result]:
    """Compares the U-Net of emoji-sd with every kind of attention against the plain one in fp32."""
    nets = {
        dtype: Teacher(EMOJI, device=setting.device, dtype=dtype).unet.to(setting.device)
        for dtype in (torch.float32, torch.bfloat16)
    }
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = example_inputs(dict(nets[torch.float32].config), 2, device=setting.device)
    for name in ("sample", "encoder_hidden_states"):
        inputs[name] = torch.randn(inputs[name].shape, generator=generator).to(setting.device)

    @torch.no_grad()
    def output(dtype: torch.dtype) -> torch.Tensor:
        given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        return nets[dtype](**given).sample.double()

    nets[torch.float32].set_attn_processor(AttnProcessor())
    plain = output(torch.float32)
    nets[torch.float32].set_attn_processor(AttnProcessor2_0())
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    backends += [SDPBackend.CUDNN_ATTENTION] if setting.device.type == "cuda" else []
    for backend in backends:
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            name = f"attention by {backend.name.lower()} in {str(dtype).removeprefix('torch.')}"
            try:
                with sdpa_kernel([backend, SDPBackend.MATH] if setting.smoke else backend):
                    error = (output(dtype) - plain).norm() / plain.norm()
                yield check(name, error.item(), most)
            except RuntimeError as unavailable:  # not every backend supports every precision and width
                yield Result(name, note=f"not available: {str(unavailable).splitlines()[0]}")


def _options(made: Made, setting: Setting) -> Iterator[Result]:
    """Compares the options that save time or memory with the plain loop on the same device in bf16."""
    bf16 = made.runtime(precision="bf16")
    plain, whole = made.train(bf16)
    has = {name: importlib.util.find_spec(name) is not None for name in ("torchao", "bitsandbytes")}
    cuda = setting.device.type == "cuda"
    if cuda:
        yield tried("no synchronisation inside a step", lambda: _synchronisations(made))
    options: list[tuple[dict[str, Any], float, bool, str]] = [
        ({"channels_last": True}, 2e-2, True, ""),
        ({"gradient_checkpointing": True}, 1e-2, True, ""),
        ({"micro_batch": 1}, 2e-2, True, ""),
        ({"offload_ema": True}, 1e-2, True, ""),
        ({"teacher_8bit": True}, 5e-2, has["torchao"], "torchao is not installed"),
        ({"teacher_fp8": True}, 2e-1, has["torchao"] and cuda, "torchao or fp8 is not available"),
        ({"use_8bit_adam": True}, 5e-2, has["bitsandbytes"] and cuda, "bitsandbytes is not available"),
        ({"compile_blocks": True}, 2e-2, True, ""),  # the first compilation may take a minute
    ]
    for option, most, there, why in options:
        name = " ".join("--" + key.replace("_", "-") for key in option)
        if not there:
            yield Result(name, note=f"not run: {why}")
            continue

        def compared(option=option, most=most, name=name) -> Result:
            rows, student = made.train(dataclasses.replace(bf16, **option))
            assert all(p.is_contiguous() for p in student.parameters()), "its weights are not contiguous"
            same = " same bits" if state_hash(student) == state_hash(whole) else ""
            return check(name, apart(rows, plain), most, note=f"against the plain loop in bf16;{same}")

        yield tried(name, compared)


def _synchronisations(made: Made) -> Result:
    """Checks that more steps do not wait for the device more often: it waits only at the start and at the end."""

    def found(steps: int) -> Counter[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                made.train(made.runtime(precision="bf16", log_every=100), steps=steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message).lower())

    with patch.object(training, "save", lambda *args, **options: None):  # checkpoints must wait
        few, many = found(4), found(8)
    more = many - few
    return check(
        "no synchronisation inside a step: more of them in 8 steps than in 4", more.total(), 0, note=str(dict(more))
    )


def _interrupted(made: Made, setting: Setting) -> Iterator[Result]:
    """Stops at step 2 of 4 and resumes, in the precision in which GPUs train."""

    def compared() -> Result:
        precision = "fp16" if setting.device.type == "cuda" else "bf16"
        runtime, folder, save = made.runtime(precision=precision), made.folder / "interrupted", training.save
        plain, whole = made.train(runtime)

        def save_and_stop(state: Any, folder: Path, step: int, *rest: Any) -> None:
            save(state, folder, step, *rest)
            if step == 2:
                raise KeyboardInterrupt

        with patch.object(training, "save", save_and_stop), suppress(KeyboardInterrupt):
            made.train(runtime, folder)
        rows, student = made.train(runtime, folder)
        same = "same bits" if state_hash(student) == state_hash(whole) else "not the same bits"
        return check(f"stopped and resumed in {precision}, against uninterrupted", apart(rows, plain), 1e-2, note=same)

    yield tried("stopped and resumed", compared)


def _pictures(setting: Setting) -> Iterator[Result]:
    """Checks that emoji-sd draws the same twice, and the same as on the CPU."""

    def pictures(device: str, dtype: torch.dtype) -> np.ndarray:
        how = prunet.Drawing(steps=4 if setting.smoke else 15, guidance_scale=2.0)
        model = prunet.Model(EMOJI, device=device, dtype=dtype)
        drawn = prunet.generate(model, "a noto emoji of red heart", num_images=2, drawing=how, seed=3)
        return np.stack([np.asarray(picture, dtype=np.float64) / 255 for picture in drawn])

    def compared() -> Result:
        half = torch.bfloat16
        once, twice = (pictures(str(setting.device), half) for _ in range(2))
        same = float(np.abs(once - twice).max())
        away = math.sqrt(float(((once - pictures("cpu", torch.float32)) ** 2).mean()))
        return check("generate twice, largest difference", same, 0.0, note=f"RMSE to the CPU's in fp32: {away:.3f}")

    yield tried("generate twice", compared)


def _counters(setting: Setting) -> Iterator[Result]:
    """Checks that a call that makes 64 MB is measured as 64 MB."""

    def compared() -> Result:
        def call() -> None:
            torch.ones(2**24, device=setting.device)

        call()
        found = working_mb(call, setting.device)
        assert found is not None
        return check("peak memory of a call that makes 64 MB: difference", abs(found - 64), 4, "MB")

    yield tried("peak memory", compared)
