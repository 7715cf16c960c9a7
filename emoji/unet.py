"""Stage 3: trains the denoiser (epsilon) on cached latents and embeddings, with weights by noise level and EMAs.

If the config names a trained model to `distil_from`, the target is a mix of the noise and that model's output.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder import encode_all
from conditioning import empty_condition, encode_captions, unet_arguments
from copy_start import start_as_copy
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from shards import Sample, known_samples, stack_images
from state import (
    autocast,
    average_gradients,
    is_finished,
    join_group,
    learning_rate,
    load_state,
    log_point,
    pick_device,
    read_record,
    save_record,
    save_state,
    smooth,
    timed_steps,
)
from torch import Tensor

from prunet.teacher.process import min_snr_weight

Cache = dict[str, Tensor]


def prepare(samples: list[Sample], root: Path, device: torch.device, tutor: Path | None = None) -> Cache:
    """Latents and prompts, made once: the frozen parts never run in the loop.

    latents (N, 4, h, w), prompts (C, T, D) and pooled (C, P) of all captions, first and count (N,): whose they are.
    `tutor_prompts`, where there is a `tutor`: its folder's encoder reads the captions too.
    """
    vae = AutoencoderKL.from_pretrained(root / "autoencoder").eval().to(device)
    latents = encode_all(vae, stack_images(samples)) * vae.config.scaling_factor
    count = torch.tensor([len(sample.captions) for sample in samples])
    texts = [caption for sample in samples for caption in sample.captions]
    captions = encode_captions(root, texts)
    if tutor:
        captions["tutor_prompts"] = encode_captions(tutor, texts)["prompts"]
    cache = {"latents": latents, "count": count, "first": count.cumsum(0) - count, **captions}
    return {name: value.to(device) for name, value in cache.items()}


def loss_weights(alphas_cumprod: Tensor, gamma: float, floor: float) -> Tensor:
    """Returns the weight of the squared error of the noise: (min(SNR, gamma) + floor) / SNR.

    With floor 0 this is min-SNR (https://arxiv.org/abs/2303.09556, equation 6), with floor 1 it tends to the loss of
    v-prediction where there is much noise. There the picture's contents are decided, and min-SNR hardly looks.
    """
    return min_snr_weight(alphas_cumprod, gamma, "epsilon") + floor * (1 - alphas_cumprod) / alphas_cumprod


@torch.no_grad()
def update_emas(emas: list[list[Tensor]], model: UNet2DConditionModel, gammas: list[float], step: int) -> None:
    """Averages over a share of the past that stays the same as it grows: decay (1 - 1 / t)^(gamma + 1)
    (https://arxiv.org/abs/2312.02696, equation 127). At the end they are not of one fixed length but of several shares.
    """
    for ema, gamma in zip(emas, gammas, strict=True):
        decay = (1 - 1 / (step + 2)) ** (gamma + 1)
        torch._foreach_lerp_(ema, list(model.parameters()), 1 - decay)


def draw_batch(
    cache: Cache, empty: Cache, batch_size: int, dropout: float, dice: torch.Generator
) -> tuple[Tensor, Cache]:
    device = cache["latents"].device
    picked = torch.randint(len(cache["latents"]), (batch_size,), generator=dice).to(device)
    which = torch.rand(batch_size, generator=dice).to(device) * cache["count"][picked]
    rows = cache["first"][picked] + which.long()
    drop = (torch.rand(batch_size, generator=dice) < dropout).to(device)
    condition = {name: cache[name][rows] for name in empty}
    for name, value in empty.items():  # guidance needs predictions without a prompt
        condition[name][drop] = value[0]
    return cache["latents"][picked], condition


def draw_timesteps(batch_size: int, count: int, dice: torch.Generator) -> Tensor:
    """Draws a timestep from each of `batch_size` equal parts of the schedule: uniform, with less variance."""
    spread = (torch.arange(batch_size) + torch.rand(batch_size, generator=dice)) / batch_size
    return (spread * count).long().clamp(max=count - 1)  # the last one may be rounded up to 1


def noise_error(
    model: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Tensor,
    condition: Cache,
    dice: torch.Generator,
    target: Callable[[Tensor, Tensor, Tensor, Cache], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the mean squared error of the predicted noise (B,), and its timesteps.

    `target` (noise, noisy latents, timesteps, condition) takes the place of the noise.
    """
    noise = torch.randn(latents.shape, generator=dice).to(latents.device)
    timesteps = draw_timesteps(len(latents), scheduler.config.num_train_timesteps, dice).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    with autocast(latents.device):
        output = model(noisy, timesteps, **unet_arguments(condition)).sample
        goal = noise if target is None else target(noise, noisy, timesteps, condition)
    return (output.float() - goal).square().mean(dim=(1, 2, 3)), timesteps


def tutored_noise(tutor: UNet2DConditionModel, share: float) -> Callable[[Tensor, Tensor, Tensor, Cache], Tensor]:
    """Returns (1 - share) x noise + share x the prediction of the trained `tutor` for the same latents and captions.

    The squared error to this mixture has the gradient of both errors' weighted sum. The tutor's part is the mean of all
    the noises that a noisy picture may have: it spares the gradient the variance of the one that was drawn.
    """

    @torch.no_grad()
    def target(noise: Tensor, noisy: Tensor, timesteps: Tensor, condition: Cache) -> Tensor:
        said = tutor(noisy, timesteps, encoder_hidden_states=condition["tutor_prompts"].float()).sample
        return torch.lerp(noise, said.float(), share)

    return target


@torch.no_grad()
def validation_loss(
    model: UNet2DConditionModel, scheduler: DDPMScheduler, cache: Cache, empty: Cache, weights: Tensor, count: int = 512
) -> float:
    """Returns the weighted loss with captions, for the same pictures, captions, noise and timesteps at every call."""
    dice, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(count // 64):
        latents, condition = draw_batch(cache, empty, 64, 0.0, dice)
        error, timesteps = noise_error(model, scheduler, latents, condition, dice)
        total += (weights[timesteps] * error).mean().item()
    return total / (count // 64)


def placed(model: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    if device.type == "cpu":  # fused attention is made for wide heads; with these narrow ones it is half as fast
        model.set_attn_processor(AttnProcessor())
    return model.to(device, memory_format=torch.channels_last)


def make_model(config: dict, device: torch.device) -> UNet2DConditionModel:
    model = UNet2DConditionModel(**config["model"])
    start_as_copy(model)
    return placed(model, device)


def train(whole_config: dict, data: Path, root: Path, *, tutor: Path | None = None, compile_step: bool = False) -> None:
    """`tutor`: the pipeline folder to distil from, in the same latent space and of the SD v1 layout."""
    config, seed = whole_config["unet"], whole_config["seed"]
    device, state_path, out = pick_device(), root / "unet.pt", root / "unet"
    if is_finished(out / "record.json", config["minutes"]):
        return
    rank, world = join_group()
    samples = known_samples(data, "train")
    cache, empty = prepare(samples, root, device, tutor), {k: v.to(device) for k, v in empty_condition(root).items()}
    heldout = prepare(known_samples(data, "heldout-combinations"), root, device, tutor)
    print(f"unet: {len(samples)} pictures of {len({sample.label for sample in samples})} labels", flush=True)
    scheduler = DDPMScheduler(**whole_config["scheduler"])
    weights = loss_weights(scheduler.alphas_cumprod, config["min_snr_gamma"], config["noise_floor"]).to(device)

    torch.manual_seed(seed)
    model, gammas = make_model(config, device), config["ema_gammas"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = load_state(state_path)
    if "model" in state:
        model.load_state_dict(state["model"])
    elif out.exists():  # shipped weights of an earlier run, whose optimizer is gone
        model.load_state_dict(UNet2DConditionModel.from_pretrained(out).state_dict())
        record = read_record(out / "record.json")
        state |= {"step": record["steps"], "seconds": record["hours"] * 3600, "images": record["images"]}
    emas = [[parameter.detach().clone() for parameter in model.parameters()] for _ in gammas]
    if "model" in state:
        optimizer.load_state_dict(state["optimizer"])
        emas = [[tensor.to(device) for tensor in ema] for ema in state["emas"]]
    state["shown"] = {}
    batch_size = config["batch_size"] // world
    compiled = torch.compile if compile_step else lambda net: net
    fast, target = compiled(model), None
    if tutor:
        empty["tutor_prompts"] = empty_condition(tutor)["prompts"].to(device)
        trained = placed(UNet2DConditionModel.from_pretrained(tutor / "unet"), device).requires_grad_(False)
        target = tutored_noise(compiled(trained), config["distil_share"])
    if compile_step:  # before the clock starts: this takes minutes
        print("unet: compiling", flush=True)
        dice = torch.Generator().manual_seed(0)
        drawn = draw_batch(cache, empty, batch_size, 0.0, dice)
        noise_error(fast, scheduler, *drawn, dice, target)[0].mean().backward()

    for progress in timed_steps("unet", state, config["minutes"]):
        lr = learning_rate(progress, config["learning_rate"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        dice = torch.Generator().manual_seed(seed + state["step"] * world + rank)
        latents, condition = draw_batch(cache, empty, batch_size, config["caption_dropout"], dice)
        error, timesteps = noise_error(fast, scheduler, latents, condition, dice, target)
        loss = (weights[timesteps] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_emas(emas, model, gammas, state["step"])

        state["images"] += len(latents) * world
        if state["step"] % 10 == 0:
            state["shown"] = {"loss": smooth(state["shown"].get("loss"), loss.item(), 0.9), "lr": lr}
        if state["step"] % 200 == 199 and rank == 0:
            log_losses(root, state, model, scheduler, {"train": cache, "heldout": heldout}, empty, weights)
            save_state(state_path, state, model=model.state_dict(), emas=emas, optimizer=optimizer.state_dict())

    if rank == 0:
        best = choose_ema(model, emas, gammas, lambda: validation_loss(model, scheduler, cache, empty, weights, 2048))
        log_losses(root, state, model, scheduler, {"train": cache, "heldout": heldout}, empty, weights)
        finish(model, samples, state | {"ema": best}, root)


def log_losses(
    root: Path,
    state: dict,
    model: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    caches: dict[str, Cache],
    empty: Cache,
    weights: Tensor,
) -> None:
    losses = {name: validation_loss(model, scheduler, cache, empty, weights) for name, cache in caches.items()}
    log_point(root / "unet-log.jsonl", state, **losses)


def choose_ema(
    model: UNet2DConditionModel, emas: list[list[Tensor]], gammas: list[float], measure: Callable[[], float]
) -> dict[str, float]:
    """Puts the average with the lowest loss into `model`; returns the losses of all."""
    found = {}
    for ema, gamma in zip(emas, gammas, strict=True):
        _copy_into(model, ema)
        found[str(gamma)] = measure()
    best = min(range(len(gammas)), key=lambda index: list(found.values())[index])
    _copy_into(model, emas[best])
    return found


@torch.no_grad()
def _copy_into(model: UNet2DConditionModel, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)


def finish(model: UNet2DConditionModel, samples: list[Sample], state: dict, root: Path) -> None:
    model.to(memory_format=torch.contiguous_format).save_pretrained(root / "unet")
    labels = sorted({sample.label for sample in samples})
    record = {
        "images": state["images"],
        "steps": state["step"],
        "hours": state["seconds"] / 3600,
        "loss_by_ema": state["ema"],
        "pictures": len(samples),
        "labels": len(labels),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save_record(record, root / "unet" / "record.json")
    print(record, flush=True)
