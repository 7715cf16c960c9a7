"""Distillation: one visible loop, read from top to bottom."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from prunet import processes
from prunet.console import progress
from prunet.data.cache import Cache
from prunet.denoisers.base import Pair
from prunet.denoisers.taps import tap
from prunet.denoisers.unet2d.attention import fast_attention, kept_memory
from prunet.denoisers.unet2d.pairs import term_factors
from prunet.errors import UserError
from prunet.recipe.recipe import Stage
from prunet.runtime import Runtime
from prunet.teacher.conditioning import conditioning
from prunet.teacher.teacher import Teacher, after_overflow
from prunet.training.checkpoints import checkpoints, resume, save
from prunet.training.fit import micro_batch_of
from prunet.training.fsdp import local, shard, unsharded, whole
from prunet.training.gpu import compiled_blocks, in_8_bits, set_memory_format
from prunet.training.log import Log, log_note, log_row
from prunet.training.losses import add_noise, feature_losses, min_snr_weight, mse, training_target
from prunet.training.noise import Draws, batches
from prunet.training.sheets import Sheets


def learning_rate_at(stage: Stage, step: int) -> float:
    """Linear warm-up, then constant or a half cosine to 0."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


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

    Resumes from the last checkpoint in `folder` if there is one; on one CPU the result is bit-equal to that of a run
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
                row = log_row(done, means, weights, factors, learning_rate_at(stage, step), speed)
                if accelerator.is_main_process:
                    log.write(row)
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
                bar.advance(0, log_note(row))
                if drawing and sheets:
                    sheets.draw(done, student, held, ema)
                # Last, so that a run that resumes from this checkpoint has all that belongs to the steps before it.
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


def _check_finite(means: dict[str, float], step: int, stage: Stage, folder: Path, *, overflow_is_skipped: bool) -> None:
    """Losses and gradients; in fp16 the scaler skips the steps whose gradients overflow."""
    bad = [n for n, v in means.items() if not math.isfinite(v) and not (n == "grad_norm" and overflow_is_skipped)]
    if bad:
        saved = checkpoints(folder)
        state = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        raise UserError(
            f"The loss is not finite at step {step} ({', '.join(bad[:3])}); {state}, and the same command resumes from "
            f"there: try a lower learning_rate (now {stage.learning_rate:g}), more warmup_steps, a lower "
            "max_grad_norm, or --precision bf16 or no"
        )
