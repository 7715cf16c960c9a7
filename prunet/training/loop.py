"""Distillation: one visible loop, read from top to bottom."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from prunet import processes
from prunet.console import progress
from prunet.data.encoding import Cache
from prunet.denoisers.taps import tap
from prunet.denoisers.unet2d.attention import fast_attention, kept_memory
from prunet.denoisers.unet2d.pairs import Pair, term_factors
from prunet.disk.files import clear_errors, new_file
from prunet.errors import UserError
from prunet.plan.size import fitting_micro_batch
from prunet.recipe.recipe import Losses, Stage
from prunet.teacher.teacher import Teacher, after_overflow, conditioning
from prunet.training.checkpoints import checkpoints, resume, save
from prunet.training.fsdp import local, shard, unsharded, whole
from prunet.training.gpu import compiled_blocks, in_8_bits, set_memory_format
from prunet.training.losses import add_noise, feature_losses, min_snr_weight, mse, training_target
from prunet.training.noise import Draws, batches
from prunet.training.sheets import Sheets

Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class Runtime:
    """Where and how it runs; no result depends on it but for rounding.

    `micro_batch`: samples at once on each device (None: the most that fits); `log_every`: steps between two read-backs
    of the losses, which are the only points where the device is waited for. What saves memory: `gradient_checkpointing`
    (costs time), `offload_ema` (the average waits on the CPU), `use_8bit_adam` (bitsandbytes), `teacher_8bit` (torchao:
    its linear layers' weights in 8 bits), `fsdp` (several processes share out the student's weights, gradients, moments
    and average). What saves time: `compile` (teacher and student by torch.compile, features included),
    `compile_blocks` (their transformer blocks alone, which takes seconds instead of minutes), `channels_last` (the
    memory format in which convolutions of GPUs work), `teacher_fp8` (torchao: the teacher's linear layers multiply in
    fp8, on GPUs from Hopper on).
    """

    device: str | None = None
    precision: Precision = "auto"
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    offload_ema: bool = False
    use_8bit_adam: bool = False
    teacher_8bit: bool = False
    teacher_fp8: bool = False
    fsdp: bool = False
    compile: bool = False
    compile_blocks: bool = False
    channels_last: bool = False
    tracker: str | None = None
    log_every: int = 10

    @property
    def torch_device(self) -> torch.device:
        kind = self.device or ("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
        if kind == "cuda" and processes.count() > 1:
            return torch.device("cuda", processes.local_rank())
        return torch.device(kind)

    def use_device(self) -> None:
        """accelerate takes the current CUDA device, whatever its number."""
        if self.torch_device.type == "cuda" and self.torch_device.index is not None:
            torch.cuda.set_device(self.torch_device)

    @property
    def mixed_precision(self) -> str:
        """`auto` is bf16 where the hardware multiplies it, else full precision."""
        if self.precision != "auto":
            return self.precision
        if self.torch_device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        fast = self.torch_device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return "bf16" if fast else "no"

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def learning_rate_at(stage: Stage, step: int) -> float:
    """Linear warm-up, then constant or a half cosine to 0."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def micro_batch_of(
    stage: Stage,
    runtime: Runtime,
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    latent_size: tuple[int, int],
    ranks: int = 1,
) -> int:
    """Samples at once on each device: as asked, or what fits. Refuses a number that does not divide the batch."""
    share, rest = divmod(stage.batch_size, ranks)
    asked = runtime.micro_batch
    if rest or not share or (asked and share % asked):
        fits = [str(m) for m in range(1, share + 1) if share % m == 0] if share and not rest else []
        raise UserError(
            f"batch_size {stage.batch_size} on {ranks} process(es) cannot be shared out"
            + (
                f" in micro-batches of {asked}: choose --micro-batch {', '.join(fits)}"
                if fits
                else ": choose a multiple"
            )
        )
    return asked or fitting_micro_batch(
        teacher_config,
        student_config,
        batch_size=share,
        device=runtime.torch_device,
        latent_size=latent_size,
        **memory_options(stage, runtime),
    )


def memory_options(stage: Stage, runtime: Runtime) -> dict[str, Any]:
    """How much is kept, as `prunet.plan.size.training_memory` asks for it."""
    return {
        "half": runtime.mixed_precision != "no",
        "ema": stage.ema_decay is not None and not runtime.offload_ema,
        "gradient_checkpointing": runtime.gradient_checkpointing,
        "use_8bit_adam": runtime.use_8bit_adam,
        "teacher_8bit": runtime.teacher_8bit or runtime.teacher_fp8,
        "shards": processes.count() if runtime.fsdp else 1,
    }


def distil(
    teacher: Teacher,
    student: UNet2DConditionModel,
    pairs: Sequence[Pair],
    cache: Cache,
    stage: Stage,
    folder: Path | str,
    *,
    seed: int = 1234,
    runtime: Runtime | None = None,
    sheets: Sheets | None = None,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
) -> UNet2DConditionModel:
    """Trains `student` to draw as `teacher` does; returns it with its EMA weights (if the stage has an EMA).

    Goes on from the last checkpoint in `folder` if there is one; on one CPU the result is bit-equal to that of a run
    that was never stopped. Writes `checkpoints/`, `log.jsonl` and `sheets/`.

    Raises:
        UserError: a micro-batch that does not divide the batch, a checkpoint of another stage, a cache of another
            teacher, or a loss that is not finite (the last good checkpoint stays).
    """
    folder, runtime = Path(folder), runtime or Runtime()
    runtime.use_device()
    processes.join(runtime.torch_device)
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process; ours may change
    accelerator = Accelerator(
        mixed_precision=runtime.mixed_precision,
        cpu=runtime.torch_device.type == "cpu",
        log_with=runtime.tracker,
        project_dir=str(folder) if runtime.tracker else None,
        # Gradients lie where they are averaged, not there as well.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    device, ranks = accelerator.device, accelerator.num_processes
    configs = (teacher.unet_config, dict(student.config))
    # One number for all, though their devices may differ: they meet at every step.
    micro_batch = processes.from_main(lambda: micro_batch_of(stage, runtime, *configs, cache.latent_size, ranks))
    cache.check(teacher)

    # Pairs are module objects of the bare models, found before anything is wrapped.
    student_modules = [student.get_submodule(pair.student) for pair in pairs]
    teacher_unet = teacher.unet.to(device)
    if runtime.teacher_8bit or runtime.teacher_fp8:
        teacher_unet = in_8_bits(teacher_unet, fp8=runtime.teacher_fp8)
    teacher_modules = [teacher_unet.get_submodule(pair.teacher) for pair in pairs]
    student.to(device).train().requires_grad_(True)
    if runtime.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if runtime.fsdp:
        shard(student, device)
    held = [local(parameter) for parameter in student.parameters()]
    optimizer = _adamw(runtime)(student.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)
    ema = EMAModel(held, decay=stage.ema_decay, foreach=True) if stage.ema_decay else None
    start = resume(folder, stage, student, optimizer, ema, accelerator)
    if runtime.channels_last:
        set_memory_format(torch.channels_last, (teacher_unet, student), optimizer, ema)
    if ema and runtime.offload_ema:
        ema.to("cpu")
    # In evaluation mode accelerate gives the model its precision and leaves out DDP, which FSDP stands in for.
    compiled: Any = torch.compile if runtime.compile else lambda net: net
    model = accelerator.prepare_model(compiled(student), evaluation_mode=runtime.fsdp)
    frozen_unet = compiled(teacher_unet)
    # In one kernel, instead of one for each operation of each pair.
    fused = runtime.compile or runtime.compile_blocks
    compare: Any = torch.compile(feature_losses) if fused else feature_losses
    optimizer = accelerator.prepare_optimizer(optimizer)
    if runtime.tracker:
        accelerator.init_trackers("prunet", config={"stage": stage.model_dump_json()})

    scheduler = teacher.noise_scheduler
    prediction_type = scheduler.config.prediction_type
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    names = ["task", "output", *(f"feature/{pair.teacher}" for pair in pairs), "grad_norm"]
    weights = stage.losses
    factors = term_factors(pairs, weights.weights)
    use_features = weights.feature > 0 and bool(pairs)
    scale = torch.tensor(factors, device=device)
    draws = Draws(cache, stage, seed, scheduler.config.num_train_timesteps)
    micro_batches = batches(draws, start, micro_batch, accelerator.process_index, ranks)
    accumulate = stage.batch_size // (micro_batch * ranks)
    log = processes.from_main(lambda: Log(folder / "log.jsonl", start))
    sums, since, clock = torch.zeros(len(names), device=device), 0, time.perf_counter()
    overflows = torch.zeros((), device=device)  # micro-batches of which the teacher's own output is not finite

    with (
        progress("Distilling", stage.steps) as bar,
        kept_memory(device),
        fast_attention([teacher_unet, student], device, half=runtime.mixed_precision != "no"),
        compiled_blocks([teacher_unet, student], runtime.compile_blocks),
        tap(student_modules if use_features else []) as student_features,
        tap(teacher_modules if use_features else []) as teacher_features,
    ):
        bar.advance(start)
        for step in range(start, stage.steps):
            if sheets and step == start == 0:
                sheets.draw(0, student, held, ema=None)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(stage, step)
            for micro in range(accumulate):
                batch = {k: v.to(device, non_blocking=True) for k, v in next(micro_batches).items()}
                abar = alphas_cumprod[batch["timestep"]]
                noisy = add_noise(batch["latents"], batch["noise"], abar)
                target = training_target(batch["latents"], batch["noise"], abar, prediction_type)
                text = (batch["embeds"], batch.get("pooled"), batch.get("time_ids"))

                with torch.no_grad():
                    # Micro-conditioning stays in fp32: bf16 cannot hold every size in pixels.
                    dtype = teacher_unet.dtype
                    pooled = None if text[1] is None else text[1].to(dtype)
                    frozen = conditioning(text[0].to(dtype), pooled, text[2])
                    eps_t = frozen_unet(noisy.to(dtype), batch["timestep"], **frozen, return_dict=False)[0]
                    overflows += ~eps_t.isfinite().all()
                last = micro == accumulate - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    eps_s = model(noisy, batch["timestep"], **conditioning(*text), return_dict=False)[0]
                    # Min-SNR weighs what is learned from the data, never what is learned from the teacher.
                    gamma = stage.min_snr_gamma
                    weight = min_snr_weight(abar, gamma, prediction_type) if gamma else None
                    terms = torch.stack([mse(eps_s, target, weight), mse(eps_s, eps_t)])
                    loss = weights.task * terms[0] + weights.output * terms[1]
                    if use_features:
                        # Named nowhere, so that the teacher's are gone before the backward pass.
                        features = compare(student_features.take(), teacher_features.take(), weights.normalize)
                        loss = loss + weights.feature * (scale * features).sum()
                        terms = torch.cat([terms, features])
                    accelerator.backward(loss / accumulate)
                sums[: len(terms)] += terms.detach() / accumulate

            norm = accelerator.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
            sums[-1] += whole(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                if runtime.offload_ema:
                    ema.to(device)
                ema.step(held)
                if runtime.offload_ema:
                    ema.to("cpu")
            since, done = since + 1, step + 1
            bar.advance()

            saving = done % checkpoint_every == 0 or done == stage.steps
            drawing = sheets is not None and sheets.every > 0 and (done % sheets.every == 0 or done == stage.steps)
            if done % runtime.log_every == 0 or saving or drawing:
                # The only place where the device is waited for.
                means = dict(zip(names, (accelerator.reduce(sums, "mean") / since).tolist(), strict=True))
                if not all(map(math.isfinite, means.values())) and accelerator.reduce(overflows, "sum"):
                    raise UserError(
                        f"The output of the teacher {teacher.source} itself is not finite at step {done}: it overflows "
                        f"in {teacher_unet.dtype}: {after_overflow(teacher_unet.dtype)}"
                    )
                _check_finite(means, done, stage, folder, overflow_is_skipped=accelerator.scaler is not None)
                speed = since * stage.batch_size / (time.perf_counter() - clock)
                row = _row(done, means, weights, factors, learning_rate_at(stage, step), speed)
                if accelerator.is_main_process:
                    log.write(row)
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
                bar.advance(0, _note(row))
                if drawing and sheets:
                    sheets.draw(done, student, held, ema)
                # Last, so that a run that goes on from this checkpoint has all that belongs to the steps before it.
                if saving:
                    save(folder, done, stage, student, optimizer, ema, accelerator, keep_checkpoints)
                accelerator.wait_for_everyone()
                sums.zero_()
                since, clock = 0, time.perf_counter()
    if runtime.tracker:
        accelerator.end_training()
    if ema:
        ema.copy_to(held)
    student = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if runtime.fsdp:
        student = unsharded(student)
    student.disable_gradient_checkpointing()
    if runtime.channels_last:
        set_memory_format(torch.contiguous_format, (teacher_unet, student))
    return student.eval().requires_grad_(False).to("cpu")


def _adamw(runtime: Runtime) -> Any:
    if not runtime.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)  # one kernel; several times as fast as a loop over the weights
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


# -- what is written on the way


def _row(
    step: int, means: dict[str, float], weights: Losses, factors: Sequence[float], lr: float, speed: float
) -> dict[str, Any]:
    """Terms as they are; `feature` is their sum with the factors, `loss` what was minimised."""
    terms = [value for name, value in means.items() if name.startswith("feature/")]
    feature = sum(factor * value for factor, value in zip(factors, terms, strict=True))
    total = weights.task * means["task"] + weights.output * means["output"] + weights.feature * feature
    row = {"step": step, "loss": total, "task": means["task"], "output": means["output"], "feature": feature}
    return {**row, **means, "learning_rate": lr, "images_per_s": round(speed, 4)}


def _note(row: dict[str, Any]) -> str:
    parts = [f"{name} {row[name]:.4f}" for name in ("loss", "task", "output", "feature")]
    return "  ".join([*parts, f"{row['images_per_s']:.3g} images/s"])


class Log:
    """`log.jsonl`: one row a read-back. Rows after the checkpoint from which a run goes on are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [row for row in read_log(path) if row["step"] <= start] if path.exists() else []
        with new_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        with clear_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line that a kill cut in two is left out.

    Raises:
        UserError: another line is damaged.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1].get("step"), int):
                raise TypeError("no step in it")
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, ValueError) and not line.endswith(b"\n"):
                break
            raise UserError(
                f"{path}: line {number} is damaged ({error}): delete the file (the charts then lack its rows), or "
                f"{path.parent} to train it again"
            ) from error
    return rows


def _check_finite(means: dict[str, float], step: int, stage: Stage, folder: Path, *, overflow_is_skipped: bool) -> None:
    """Losses and gradients; in fp16 the scaler skips the steps whose gradients overflow."""
    bad = [n for n, v in means.items() if not math.isfinite(v) and not (n == "grad_norm" and overflow_is_skipped)]
    if bad:
        saved = checkpoints(folder)
        state = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        raise UserError(
            f"The loss is not finite at step {step} ({', '.join(bad[:3])}); {state}, and the same command goes on from "
            f"there: try a lower learning_rate (now {stage.learning_rate:g}), more warmup_steps, a lower "
            "max_grad_norm, or --precision bf16 or no"
        )
