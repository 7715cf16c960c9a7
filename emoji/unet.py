"""Stage 3: the denoiser, on cached latents and prompt embeddings. Epsilon, min-SNR weights, EMA."""

from pathlib import Path

import torch
from autoencoder import encode_all
from copy_start import start_as_copy
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from shards import read_split, stack_images
from state import (
    atomic_save,
    autocast,
    average_gradients,
    is_finished,
    join_group,
    learning_rate,
    load_state,
    pick_device,
    save_record,
    smooth,
    timed_steps,
)
from text import read_known_labels, tokenize
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


@torch.no_grad()
def encode_captions(root: Path, captions: list[str], batch_size: int = 64) -> Tensor:
    """(N, 77, width) fp16: what the pipeline will feed the U-Net."""
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(root / "text_encoder").eval().to(pick_device())
    batches = tokenize(tokenizer, captions).split(batch_size)
    return torch.cat([encoder(batch.to(encoder.device)).last_hidden_state.half().cpu() for batch in batches])


def prepare(data: Path, root: Path) -> dict[str, Tensor | list[Tensor]]:
    """Latents and prompts of the known labels, made once: the frozen parts never run in the loop."""
    known = set(read_known_labels())
    samples = [sample for sample in read_split(data, "train") if sample.label in known]
    vae = AutoencoderKL.from_pretrained(root / "autoencoder").eval().to(pick_device())
    captions = [caption for sample in samples for caption in sample.captions]
    embeddings = encode_captions(root, captions)
    counts = [len(sample.captions) for sample in samples]
    return {
        "latents": encode_all(vae, stack_images(samples)) * vae.config.scaling_factor,
        "prompts": list(embeddings.split(counts)),
        "empty": encode_captions(root, [""])[0],
        "labels": sorted({sample.label for sample in samples}),
    }


def min_snr_weights(alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR, for epsilon prediction. https://arxiv.org/abs/2303.09556, equation 6"""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: UNet2DConditionModel, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # young averages must forget the random start
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)


def draw_batch(cache: dict, config: dict, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    picked = torch.randint(len(cache["latents"]), (config["batch_size"],), generator=dice)
    choice = torch.rand(len(picked), generator=dice).tolist()
    drop = torch.rand(len(picked), generator=dice) < config["caption_dropout"]
    rows = [cache["prompts"][i] for i in picked.tolist()]
    prompts = torch.stack([row[int(u * len(row))] for row, u in zip(rows, choice, strict=True)])
    prompts[drop] = cache["empty"]  # so that guidance has something to point away from
    return cache["latents"][picked], prompts.float()


def train(whole_config: dict, data: Path, root: Path) -> None:
    config, seed = whole_config["unet"], whole_config["seed"]
    device, state_path, out = pick_device(), root / "unet.pt", root / "unet"
    if is_finished(out / "record.json", config["minutes"]):
        return
    rank, world = join_group()
    config = {**config, "batch_size": config["batch_size"] // world}
    cache = prepare(data, root)
    print(f"unet: {len(cache['latents'])} pictures of {len(cache['labels'])} labels", flush=True)
    scheduler = DDPMScheduler(**whole_config["scheduler"])
    weights = min_snr_weights(scheduler.alphas_cumprod, config["min_snr_gamma"]).to(device)

    torch.manual_seed(seed)
    model = UNet2DConditionModel(**config["model"]).to(device, memory_format=torch.channels_last)
    start_as_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    state = load_state(state_path)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = {name: value.to(device) for name, value in state["ema"].items()}
    state["shown"] = {}

    for progress in timed_steps("unet", state, config["minutes"]):
        lr = learning_rate(progress, config["learning_rate"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        dice = torch.Generator().manual_seed(seed + state["step"] * world + rank)
        latents, prompts = draw_batch(cache, config, dice)
        noise = torch.randn(latents.shape, generator=dice)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=dice)
        noisy = scheduler.add_noise(latents, noise, timesteps).to(device, memory_format=torch.channels_last)

        with autocast(device):
            output = model(noisy, timesteps.to(device), prompts.to(device)).sample
        error = (output.float() - noise.to(device)).square().mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, config["ema_decay"], state["step"])

        state["images"] += len(latents) * world
        state["shown"] = {"loss": smooth(state["shown"].get("loss"), error.mean().item()), "lr": lr}
        if state["step"] % 100 == 99 and rank == 0:
            parts = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
            atomic_save({**state, **parts}, state_path)

    if rank == 0:
        model.load_state_dict(ema)
        finish(model, cache, state, root)


def finish(model: UNet2DConditionModel, cache: dict, state: dict, root: Path) -> None:
    model.save_pretrained(root / "unet")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in cache["labels"]))
    record = {
        "images": state["images"],
        "steps": state["step"],
        "hours": state["seconds"] / 3600,
        "loss": state["shown"].get("loss"),
        "pictures": len(cache["latents"]),
        "labels": len(cache["labels"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save_record(record, root / "unet" / "record.json")
    print(record)
