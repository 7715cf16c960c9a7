"""Distillation: one visible loop, read from top to bottom."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunet import unet
from prunet.console import progress, say
from prunet.errors import UserError
from prunet.files import new_file, new_folder, read_json, write_json
from prunet.latents import Cache
from prunet.losses import add_noise, feature_losses, min_snr_weight, mse, training_target
from prunet.pairs import Pair, term_factors
from prunet.recipe import Losses, Stage
from prunet.sheets import Sheets
from prunet.size import fitting_micro_batch
from prunet.taps import tap
from prunet.teacher import Teacher, conditioning

Precision = Literal["auto", "no", "bf16", "fp16"]
#: What may be changed between two parts of one stage: how fast it goes and how far, not what is learned.
PACE = {"steps", "learning_rate", "schedule", "warmup_steps", "max_grad_norm"}


@dataclass(frozen=True)
class Runtime:
    """Where and how it runs; no result depends on it but for rounding.

    `micro_batch`: samples at once on each device (None: the whole batch); `log_every`: steps between two read-backs
    of the losses, which are the only points where the device is waited for. What saves memory: `gradient_checkpointing`
    (costs time), `offload_ema` (the average waits on the CPU), `use_8bit_adam` (bitsandbytes), `teacher_8bit` (torchao:
    its linear layers' weights in 8 bits).
    """

    device: str | None = None
    precision: Precision = "auto"
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    offload_ema: bool = False
    use_8bit_adam: bool = False
    teacher_8bit: bool = False
    tracker: str | None = None
    log_every: int = 10

    @property
    def torch_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")

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


class Draws(Dataset[dict[str, Tensor]]):
    """What the denoiser sees at (step, position in the batch): a pure function of these two and the seed.

    So it depends neither on the micro-batch nor on the number of processes, and a resumed run needs no generator
    state. An item: `latents` and `noise` (4, h, w), `timestep` (), `embeds` (77, D), SDXL's `pooled` and `time_ids`.
    """

    def __init__(self, cache: Cache, stage: Stage, seed: int, num_timesteps: int) -> None:
        self.cache, self.stage, self.seed, self.num_timesteps = cache, stage, seed, num_timesteps
        self.unconditional = cache.unconditional

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        step, position = at
        number = step * self.stage.batch_size + position
        sample = self.cache.sample(self._choose(step, position))
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        latents = sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)
        noise = torch.randn(sample.mean.shape, generator=rng)
        timestep = torch.randint(0, self.num_timesteps, (), generator=rng)
        dropped = bool(torch.rand((), generator=rng) < self.stage.caption_dropout)
        empty = self.unconditional
        item = {"latents": latents, "noise": noise, "timestep": timestep}
        item["embeds"] = empty.embeds[0] if dropped else sample.embeds
        if sample.pooled is not None and sample.time_ids is not None and empty.pooled is not None:
            item["pooled"] = empty.pooled[0] if dropped else sample.pooled
            item["time_ids"] = sample.time_ids
        return item

    def _choose(self, step: int, position: int) -> int:
        """The number of a sample. A batch has one size; an epoch has about as many batches of a size as it has samples,
        in random order, and each size goes through its samples in an order of its own.
        """
        size = self.stage.batch_size
        shares = tuple(max(1, round(len(group) / size)) for group in self.cache.groups)
        epoch, at = divmod(step, sum(shares))
        chosen, before = _batch_order(self.seed, epoch, shares)[at]
        group = self.cache.groups[chosen]
        turn, place = divmod((epoch * shares[chosen] + before) * size + position, len(group))
        return group[_permutation(self.seed, turn, len(group))[place]]


@lru_cache(maxsize=4)
def _batch_order(seed: int, epoch: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, how many batches of it came before in this epoch) of each batch of an epoch."""
    batches = [group for group, share in enumerate(shares) for _ in range(share)]
    counts = [0] * len(shares)
    order = []
    for i in _permutation(seed, epoch, len(batches)):
        order.append((batches[i], counts[batches[i]]))
        counts[batches[i]] += 1
    return order


@lru_cache(maxsize=128)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    rng = torch.Generator().manual_seed((seed * 7_368_787 + epoch) % 2**63)
    return torch.randperm(count, generator=rng).tolist()


def batches(draws: Draws, start: int, micro_batch: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of one process, from step `start` on."""
    share = micro_batch * ranks

    def places() -> Iterator[list[tuple[int, int]]]:
        for step in range(start, draws.stage.steps):
            for first in range(rank * micro_batch, draws.stage.batch_size, share):
                yield [(step, position) for position in range(first, first + micro_batch)]

    cuda = torch.cuda.is_available()
    yield from DataLoader(draws, batch_sampler=places(), num_workers=4 if cuda else 0, pin_memory=cuda)  # type: ignore[arg-type]


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


def memory_options(stage: Stage, runtime: Runtime) -> dict[str, bool]:
    """How much is kept, as `prunet.size.training_memory` asks for it."""
    return {
        "half": runtime.mixed_precision != "no",
        "ema": stage.ema_decay is not None and not runtime.offload_ema,
        "gradient_checkpointing": runtime.gradient_checkpointing,
        "use_8bit_adam": runtime.use_8bit_adam,
        "teacher_8bit": runtime.teacher_8bit,
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
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process; ours may change
    accelerator = Accelerator(
        mixed_precision=runtime.mixed_precision,
        cpu=runtime.torch_device.type == "cpu",
        log_with=runtime.tracker,
        project_dir=str(folder) if runtime.tracker else None,
    )
    device, ranks = accelerator.device, accelerator.num_processes
    configs = (teacher.unet_config, dict(student.config))
    micro_batch = micro_batch_of(stage, runtime, *configs, cache.latent_size, ranks)
    cache.check(teacher)

    # Pairs are module objects of the bare models, found before anything is wrapped.
    student_modules = [student.get_submodule(pair.student) for pair in pairs]
    teacher_unet = _in_8_bits(teacher.unet.to(device)) if runtime.teacher_8bit else teacher.unet.to(device)
    teacher_modules = [teacher_unet.get_submodule(pair.teacher) for pair in pairs]
    student.to(device).train().requires_grad_(True)
    if runtime.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = _adamw(runtime)(student.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)
    ema = EMAModel(student.parameters(), decay=stage.ema_decay, foreach=True) if stage.ema_decay else None
    start = resume(folder, stage, student, optimizer, ema, accelerator)
    if ema and runtime.offload_ema:
        ema.to("cpu")
    model, optimizer = accelerator.prepare(student, optimizer)
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
    log = Log(folder / "log.jsonl", start)
    sums, since, clock = torch.zeros(len(names), device=device), 0, time.perf_counter()

    with (
        progress("Distilling", stage.steps) as bar,
        unet.fast_attention([teacher_unet, student], device, half=runtime.mixed_precision != "no"),
        tap(student_modules if use_features else []) as student_features,
        tap(teacher_modules if use_features else []) as teacher_features,
    ):
        bar.advance(start)
        for step in range(start, stage.steps):
            if sheets and step == start == 0:
                sheets.draw(0, student, ema=None)
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
                    eps_t = teacher_unet(noisy.to(dtype), batch["timestep"], **frozen, return_dict=False)[0]
                last = micro == accumulate - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    eps_s = model(noisy, batch["timestep"], **conditioning(*text), return_dict=False)[0]
                    # Min-SNR weighs what is learned from the data, never what is learned from the teacher.
                    gamma = stage.min_snr_gamma
                    weight = min_snr_weight(abar, gamma, prediction_type) if gamma else None
                    terms = torch.stack([mse(eps_s, target, weight), mse(eps_s, eps_t)])
                    loss = weights.task * terms[0] + weights.output * terms[1]
                    if use_features:
                        caught = student_features.take(), teacher_features.take()
                        features = feature_losses(*caught, weights.normalize)
                        loss = loss + weights.feature * (scale * features).sum()
                        terms = torch.cat([terms, features])
                    accelerator.backward(loss / accumulate)
                sums[: len(terms)] += terms.detach() / accumulate

            norm = accelerator.clip_grad_norm_(model.parameters(), stage.max_grad_norm)
            sums[-1] += norm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                if runtime.offload_ema:
                    ema.to(device)
                ema.step(student.parameters())
                if runtime.offload_ema:
                    ema.to("cpu")
            since, done = since + 1, step + 1
            bar.advance()

            saving = done % checkpoint_every == 0 or done == stage.steps
            drawing = sheets is not None and sheets.every > 0 and (done % sheets.every == 0 or done == stage.steps)
            if done % runtime.log_every == 0 or saving or drawing:
                # The only place where the device is waited for.
                means = dict(zip(names, (accelerator.reduce(sums, "mean") / since).tolist(), strict=True))
                _check_finite(means, done, stage, folder, overflow_is_skipped=accelerator.scaler is not None)
                speed = since * stage.batch_size / (time.perf_counter() - clock)
                row = _row(done, means, weights, factors, learning_rate_at(stage, step), speed)
                if accelerator.is_main_process:
                    log.write(row)
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
                bar.advance(0, _note(row))
                if drawing and sheets and accelerator.is_main_process:
                    sheets.draw(done, student, ema)
                # Last, so that a run that goes on from this checkpoint has all that belongs to the steps before it.
                if saving and accelerator.is_main_process:
                    save(folder, done, stage, student, optimizer, ema, accelerator, keep_checkpoints)
                accelerator.wait_for_everyone()
                sums.zero_()
                since, clock = 0, time.perf_counter()
    if runtime.tracker:
        accelerator.end_training()
    if ema:
        ema.copy_to(student.parameters())
    student = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    student.disable_gradient_checkpointing()
    return student.eval().requires_grad_(False).to("cpu")


def _adamw(runtime: Runtime) -> Any:
    if not runtime.use_8bit_adam:
        return torch.optim.AdamW
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _in_8_bits(net: UNet2DConditionModel) -> UNet2DConditionModel:
    """Weights of linear layers as int8 with a scale a row; activations stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(net, Int8WeightOnlyConfig())
    return net


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
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if row["step"] <= start] if path.exists() else []
        with new_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line that a kill cut in two is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
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


# -- checkpoints


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def save(
    folder: Path,
    step: int,
    stage: Stage,
    student: UNet2DConditionModel,
    optimizer: Any,
    ema: EMAModel | None,
    accelerator: Accelerator,
    keep: int,
) -> None:
    """Writes the state after `step` steps aside, renames it, and drops all but the last `keep`."""
    with new_folder(folder / "checkpoints" / f"step-{step:07d}") as part:
        save_file(
            {k: v.detach().contiguous() for k, v in student.state_dict().items()},
            part / "student.safetensors",
        )
        if ema:
            names = [name for name, _ in student.named_parameters()]
            save_file(dict(zip(names, ema.shadow_params, strict=True)), part / "ema.safetensors")
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        write_json(part / "state.json", {"step": step, "stage": stage.model_dump(mode="json"), "scaler": scaler})
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def resume(
    folder: Path,
    stage: Stage,
    student: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    accelerator: Accelerator,
) -> int:
    """Puts the last checkpoint's state in place and returns its step; 0 where there is none."""
    saved = checkpoints(folder)
    if not saved:
        return 0
    state = read_json(saved[-1] / "state.json")
    now = stage.model_dump(mode="json")
    changed = sorted(k for k in now if state["stage"].get(k) != now[k])
    if set(changed) - PACE:
        key = next(k for k in changed if k not in PACE)
        raise UserError(
            f"{saved[-1]}: trained with {key} {state['stage'].get(key)}, now {now[key]}: set it back, give another "
            f"output, or delete {folder / 'checkpoints'}"
        )
    if state["step"] == stage.steps and changed:
        raise UserError(
            f"{saved[-1]}: the stage is finished, with {changed[0]} {state['stage'][changed[0]]}, now "
            f"{now[changed[0]]}: set it back, raise steps to go on, or give another output"
        )
    if state["step"] > stage.steps:
        raise UserError(f"{saved[-1]}: already past steps {stage.steps}: raise it, or delete {folder / 'checkpoints'}")
    try:
        student.load_state_dict(load_file(saved[-1] / "student.safetensors"))
        optimizer.load_state_dict(torch.load(saved[-1] / "optimizer.pt", weights_only=True, map_location="cpu"))
        if ema:
            shadow = load_file(saved[-1] / "ema.safetensors")
            ema.shadow_params = [shadow[name].to(p.device) for name, p in student.named_parameters()]
            ema.optimization_step = state["step"]
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
    except Exception as error:
        before = f"delete it to go on from {saved[-2]}" if len(saved) > 1 else "delete it to begin anew"
        raise UserError(f"{saved[-1]}: damaged or of another student ({error}): {before}") from error
    how = "".join(f", {k} {state['stage'][k]} -> {now[k]}" for k in changed)
    say(f"Going on from step {state['step']} of {stage.steps}{how}")
    return int(state["step"])
