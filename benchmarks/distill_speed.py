"""Distillation, images a second and peak memory: prunet's loop beside the loop of the published scripts.

    python benchmarks/distill_speed.py emoji                         # the shipped models, seconds
    python benchmarks/distill_speed.py sd-v1 --plan bk-small         # SD v1.4's size at 512 px, random weights
    python benchmarks/distill_speed.py sd-v1 --batch 16 --micro-batch 1  # the same batch in little memory
    python benchmarks/distill_speed.py sdxl --plan vega --size 1024

The reference does on every step what the published scripts do: the VAE and the text encoder encode the batch, every
pair's features are compared in fp32, losses are read back, the EMA is updated tensor by tensor. The published
commands train with gradient checkpointing (Nota-NetsPresso/BK-SDM, scripts/kd_train.sh; segmind/distill-sd, README),
and so does the reference; with `--no-reference-checkpointing` it keeps its activations. prunet's loop reads a cache;
filling it is timed separately. Each loop runs in a process of its own, in turn, `--rounds` times; the best round
counts. The last line is JSON.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from prunet.errors import UserError
from prunet.speed.clock import reset_peak, resident_kb

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]


SIZES = {"emoji": 128, "sd-v1": 512, "sdxl": 1024}  # pixels


def make_teacher(model: str, folder: Path) -> Path:
    """Opens the shipped model, or makes random weights of the published size."""
    if model == "emoji":
        return HERE.parent / "emoji" / "emoji-sd"
    from full_size import random_pipeline

    random_pipeline(folder / "teacher", model, torch.float16 if model == "sdxl" else torch.float32)
    return folder / "teacher"


def limit_memory(device: torch.device, budget_gb: float) -> None:
    """Limits the memory: later allocations beyond the limit fail."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total), device)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(budget_gb * 1e9),) * 2)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Returns the floating-point operations a second of a large matmul, the fastest operation."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        sync(device)
        start = time.perf_counter()
        a @ a
        sync(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (resident_kb("VmHWM") or 0) * 1024 / 1e9


class Parts:
    """The seconds of each part of each step; if not `on`, nothing is timed or waited for."""

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.all: dict[str, list[float]] = {}
        self.device, self.on = device, on

    @contextmanager
    def __call__(self, name: str):
        if not self.on:
            yield
            return
        sync(self.device)
        start = time.perf_counter()
        yield
        sync(self.device)
        self.all.setdefault(name, []).append(time.perf_counter() - start)

    def timed(self, name: str, call):
        @functools.wraps(call)
        def inner(*args, **kwargs):
            with self(name):
                return call(*args, **kwargs)

        return inner

    def drawn(self, batches):
        """Yields the batches, and times the wait for each."""
        end = object()
        while True:
            with self("data"):
                batch = next(batches, end)
            if batch is end:
                return
            yield batch


def reference_loop(
    teacher, student, pairs, pictures: torch.Tensor, captions: list[str], args, runtime, *, by_parts: bool = True
) -> dict:
    """The loop of BK-SDM's training, written plainly from its description (arXiv 2305.15798).

    `by_parts`: times the parts of each step, which waits for the device after each.
    """
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from prunet.denoisers.condition import Condition
    from prunet.denoisers.unet2d.inputs import arguments

    accelerator = Accelerator(mixed_precision=runtime.mixed_precision, cpu=runtime.torch_device.type == "cpu")
    device, parts = accelerator.device, Parts(accelerator.device, by_parts)
    frozen, scheduler = teacher.unet.to(device), teacher.noise_scheduler
    vae = teacher.vae.to(device)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = []
    for pair in pairs:
        hooks.append(frozen.get_submodule(pair.teacher).register_forward_hook(keep(f"teacher {pair.teacher}")))
        hooks.append(student.get_submodule(pair.student).register_forward_hook(keep(f"student {pair.student}")))
    student.to(device).train().requires_grad_(True)
    if args.reference_checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=1e-2)
    ema = EMAModel(student.parameters(), decay=0.9999)
    model, optimizer = accelerator.prepare(student, optimizer)
    times = []
    try:
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            with parts("vae"), torch.no_grad():
                latents = vae.encode(pictures.to(device, vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
            with parts("text"), torch.no_grad():
                text = teacher.encode_prompts(captions)
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
            noisy = scheduler.add_noise(latents, noise, t)
            sizes = [(args.size, args.size, 0, 0, args.size, args.size)] * len(latents)
            known = arguments(Condition(text | teacher.size_condition(sizes)).to(device), noisy.dtype)
            with parts("teacher"), torch.no_grad():
                theirs = frozen(noisy.to(frozen.dtype), t, **known).sample
            with parts("student"):
                ours = model(noisy.float(), t, **known).sample
                mse = torch.nn.functional.mse_loss
                loss = mse(ours.float(), noise.float()) + mse(ours.float(), theirs.float())
                for pair in pairs:
                    a, b = kept[f"student {pair.student}"], kept[f"teacher {pair.teacher}"]
                    loss = loss + mse(a.float(), b.detach().float())
                accelerator.gather(loss.detach().repeat(len(latents))).mean().item()
            with parts("backward"):
                accelerator.backward(loss)
            with parts("optimizer"):
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            with parts("ema"):
                ema.step(student.parameters())
            sync(device)
            times.append(time.perf_counter() - start)
    finally:
        for hook in hooks:
            hook.remove()
    best = {name: min(seconds) for name, seconds in parts.all.items()}
    return {"seconds_per_step": min(times[1:] or times), "parts": best, "peak_memory_gb": peak_memory_gb(device)}


def prunet_loop(this, cache, folder: Path, args, runtime) -> dict:
    """Runs the real loop; its log has the images a second of each step. The first step warms up."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    from prunet.student.folder import load_unet
    from prunet.training import loop as training
    from prunet.training.checkpoints import Saving
    from prunet.training.log import read_log
    from prunet.training.loop import distil

    def steps(where: Path, parts: Parts | None = None) -> list[float]:
        """The seconds of each step, without the first, which warms up, if there are more."""
        student = load_unet(this.folder / "student")
        stage = this.recipe.stages[0].model_copy(update={"steps": args.steps + 1})
        if parts:
            for name, net in (("teacher", this.teacher.unet), ("student", student)):
                net.forward = parts.timed(name, net.forward)
        distil(this.teacher, student, this.pairs(1), cache, stage, where, runtime=runtime, saving=Saving(10**9))
        rows = read_log(where / "log.jsonl")
        return [args.batch / row["images_per_s"] for row in rows[1:] or rows]

    out: dict[str, Any] = {
        "seconds_per_step": min(steps(folder / "timed")),
        "peak_memory_gb": peak_memory_gb(runtime.torch_device),
    }
    # A separate run, because waiting for each part costs time; compiled code has no parts.
    if args.steps and not args.compile:
        parts, draw = Parts(runtime.torch_device), training.batches
        places = {"backward": (Accelerator, "backward"), "clip": (Accelerator, "clip_grad_norm_")}
        places |= {"optimizer": (torch.optim.AdamW, "step"), "ema": (EMAModel, "step")}
        with ExitStack() as stack:
            for name, place in places.items():
                stack.enter_context(patch.object(*place, parts.timed(name, getattr(*place))))
            stack.enter_context(patch.object(training, "batches", lambda *given: parts.drawn(draw(*given))))
            steps(folder / "parts", parts)
        out["parts"] = {name: min(seconds) for name, seconds in parts.all.items()}
    return out


def child(args: argparse.Namespace) -> None:
    from prunet import Run, Runtime
    from prunet.data.cache import Cache
    from prunet.recipe.recipe import Recipe
    from prunet.student.folder import load_unet

    torch.set_num_threads(args.threads)
    compiled = args.compile and args.loop == "prunet"
    runtime = Runtime(
        device=args.device,
        precision=args.precision,
        micro_batch=args.micro_batch or args.batch,
        log_every=1,
        compile=compiled,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if args.budget:
        limit_memory(runtime.torch_device, args.budget)
    stage = {"steps": 1, "batch_size": args.batch, "losses": {"level": args.level}}
    value = {"teacher": str(args.teacher), "plan": args.plan, "stages": [stage], "sheet": {"every": 0}}
    value |= {"data": {"source": str(args.folder / "pictures"), "size": args.size}, "output": str(args.folder / "run")}
    this = Run(Recipe.model_validate({**value, "evaluation": {"prompts": ["a cat"]}}), runtime)
    start = time.perf_counter()
    for step in this.step_names("cache"):
        this.do(step)
    out: dict = {"prepared_s": time.perf_counter() - start}
    device, cache = runtime.torch_device, Cache.open(this.cache_folder)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reset_peak()  # of the preparation
    if args.loop == "reference":
        student = load_unet(this.folder / "student")
        torch.manual_seed(0)
        pictures = torch.rand(args.batch, 3, args.size, args.size) * 2 - 1
        out |= reference_loop(this.teacher, student, this.pairs(1), pictures, ["a cat"] * args.batch, args, runtime)
    else:
        this.teacher.release("vae", "text")
        out |= prunet_loop(this, cache, Path(tempfile.mkdtemp(dir=args.folder)), args, runtime)
    macs = [size.macs + size.attention_macs for size in (this.derived.teacher_size, this.derived.student_size)]
    side = (args.size / this.teacher.native_size) ** 2
    flops = 2 * (macs[0] + 3 * macs[1]) * side * args.batch  # forward of both, twice as much backward of the student
    dtype = runtime.dtype
    out["images_per_s"] = args.batch / out["seconds_per_step"]
    out["share_of_matmul_peak"] = flops / out["seconds_per_step"] / matmul_flops(device, dtype)
    print(json.dumps(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["emoji", "sd-v1", "sdxl"])
    parser.add_argument("--plan", default="bk-small")
    parser.add_argument("--level", default="block", help="of the feature losses (%(default)s)")
    parser.add_argument("--size", type=int, help="pixels; 128, 512 and 1024 by default")
    parser.add_argument("--batch", type=int, help="16 for emoji, else 1")
    parser.add_argument("--micro-batch", type=int, help="samples at once in prunet's loop; the whole batch by default")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed ones after one that warms up (%(default)s); 0: that one, for memory"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each loop, in turn (%(default)s)")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="prunet's loop by torch.compile")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in prunet's loop")
    parser.add_argument(
        "--reference-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in the reference, as published (%(default)s)",
    )
    parser.add_argument("--budget", type=float, metavar="GB", help="memory that each loop may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--loop", choices=["reference", "prunet"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = SIZES[args.model] if args.size is None else args.size
    args.batch = (16 if args.model == "emoji" else 1) if args.batch is None else args.batch
    for name, least in (("size", 8), ("batch", 1), ("micro_batch", 1), ("steps", 0), ("rounds", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if args.size % 8:
        parser.error(f"--size {args.size}: give a multiple of 8")
    if args.loop:
        try:
            return child(args)
        except UserError as error:
            raise SystemExit(str(error)) from None

    from small_models import make_pictures

    with tempfile.TemporaryDirectory(prefix="prunet-speed-") as text:
        folder = Path(text)
        make_pictures(folder / "pictures", 2 * args.batch, args.size)
        teacher = make_teacher(args.model, folder)
        best: dict[str, dict] = {}
        for _ in range(args.rounds):
            for loop in ("reference", "prunet"):
                where = ["--loop", loop, "--folder", str(folder), "--teacher", str(teacher)]
                command = [sys.executable, __file__, *sys.argv[1:], *where]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise SystemExit(f"the {loop} loop failed")
                found = json.loads(done.stdout.splitlines()[-1])
                print(loop, json.dumps(found), flush=True)
                if loop not in best or found["images_per_s"] > best[loop]["images_per_s"]:
                    best[loop] = found
    speed = best["prunet"]["images_per_s"] / best["reference"]["images_per_s"]
    memory = best["prunet"]["peak_memory_gb"] / best["reference"]["peak_memory_gb"]
    for name, found in best.items():
        shares = ", ".join(
            f"{part} {seconds / found['seconds_per_step']:.0%}" for part, seconds in found.get("parts", {}).items()
        )
        print(f"{name}: {found['images_per_s']:.3g} images/s, of a step: {shares}")
    print(f"prunet: {speed:.2f} times the images a second, {memory:.0%} of the peak memory")
    names = ("model", "plan", "size", "batch", "micro_batch", "threads", "reference_checkpointing")
    said = {name: getattr(args, name) for name in names}
    print(json.dumps({**said, **best, "speed": speed, "memory": memory}))
    return None


if __name__ == "__main__":
    main()
