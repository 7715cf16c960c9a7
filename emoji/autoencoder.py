"""Stage 1: the AutoencoderKL. 128 px pictures to 16x16x4 latents that are centred and evenly scaled."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from shards import read_split, stack_images, to_model
from state import (
    autocast,
    is_finished,
    learning_rate,
    load_state,
    pick_device,
    save_record,
    save_state,
    smooth,
    timed_steps,
)
from thumbnail_start import start_as_thumbnail
from torch import Tensor


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def random_crop(images: Tensor, size: int, dice: torch.Generator) -> Tensor:
    """Cuts one window from the whole batch: with a quarter of the pixels the budget has three times the steps."""
    top, left = torch.randint(images.shape[-1] - size + 1, (2,), generator=dice).tolist()
    return images[..., top : top + size, left : left + size]


def reconstruction_loss(output: Tensor, target: Tensor, config: dict) -> Tensor:
    """L1 + MSE + L1 of the gradients, at full and at quarter size (for colours of large areas)."""
    loss = output.new_zeros(())
    for scale in (1, 4):
        if scale > 1:
            output, target = F.avg_pool2d(output, scale), F.avg_pool2d(target, scale)
        loss = loss + F.l1_loss(output, target) + config["mse_weight"] * F.mse_loss(output, target)
        for ours, theirs in zip(edges(output), edges(target), strict=True):
            loss = loss + config["edge_weight"] * F.l1_loss(ours, theirs)
    return loss


@torch.no_grad()
def psnr_db(model: AutoencoderKL, images: Tensor, batch_size: int = 32) -> float:
    """Returns the mean PSNR of pictures in [0, 1], decoded from the means of their posteriors."""
    device, total = model.device, 0.0
    for batch in images.split(batch_size):
        target = to_model(batch).to(device)
        output = model.decode(model.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((output - target) / 2).square().mean(dim=(1, 2, 3))
        total += (-10 * mse.log10()).sum().item()
    return total / len(images)


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor, batch_size: int = 32) -> Tensor:
    """Returns the means of the posteriors (N, 4, H / 8, W / 8), not scaled."""
    batches = images.split(batch_size)
    return torch.cat([model.encode(to_model(batch).to(model.device)).latent_dist.mode().cpu() for batch in batches])


@torch.no_grad()
def center_latents(model: AutoencoderKL, latents: Tensor) -> None:
    """Folds a shift and a per-channel factor into the two 1x1 convolutions around the latents.

    White backgrounds give latents a strong mean, but SD v1 pipelines can only scale, and a diffusion that
    ends at an alpha above zero has to learn that mean at every step. After this the mean is zero and all
    channels have one size, while decode(encode(x)) is the same function as before.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    factor = std.square().mean().sqrt() / std
    channels = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    mean, factor = mean.to(quant.weight), factor.to(quant.weight)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= factor[None, :, None, None]
    quant.weight[:channels] *= factor[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * factor
    quant.bias[channels:] += 2 * factor.log()  # the second half are log-variances


def train(config: dict, data: Path, root: Path, seed: int) -> None:
    device, state_path = pick_device(), root / "autoencoder.pt"
    if is_finished(root / "autoencoder" / "record.json", config["minutes"]):
        return
    images = stack_images(read_split(data, "train"))
    heldout = torch.cat([stack_images(read_split(data, f"heldout-{name}")) for name in ("combinations", "labels")])

    torch.manual_seed(seed)
    model = AutoencoderKL(**config["model"]).to(device, memory_format=torch.channels_last)
    start_as_thumbnail(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    state = load_state(state_path)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    state["shown"] = {}

    for progress in timed_steps("autoencoder", state, config["minutes"]):
        lr = learning_rate(progress, config["learning_rate"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        # One generator per step, so that a resumed run draws the same numbers as an uninterrupted one.
        dice = torch.Generator().manual_seed(seed + state["step"])
        picked = torch.randint(len(images), (config["batch_size"],), generator=dice)
        batch = images[picked]
        if progress < config["crop_until"]:
            batch = random_crop(batch, config["crop"], dice)
        batch = to_model(batch).to(device, memory_format=torch.channels_last)
        if torch.rand((), generator=dice) < 0.5:
            batch = batch.flip(-1)

        with autocast(device):
            posterior = model.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=dice).to(device)
            output = model.decode(posterior.mean + posterior.std * noise).sample
        loss = reconstruction_loss(output.float(), batch, config) + config["kl_weight"] * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        state["images"] += len(batch)
        mse = F.mse_loss(output.detach().float(), batch).item() / 4
        state["shown"] = {"loss": smooth(state["shown"].get("loss"), loss.item()), "lr": lr}
        state["shown"]["mse"] = smooth(state["shown"].get("mse"), mse)
        if state["step"] % 100 == 99:
            print(f"autoencoder: {psnr_db(model, heldout[:48]):.2f} dB on 48 held-out pictures", flush=True)
            save_state(state_path, state, model=model.state_dict(), optimizer=optimizer.state_dict())

    finish(model, images, heldout, state, root)


def finish(model: AutoencoderKL, images: Tensor, heldout: Tensor, state: dict, root: Path) -> None:
    center_latents(model, encode_all(model, images))
    latents = encode_all(model, images)
    model.register_to_config(scaling_factor=1 / latents.std().item())
    record = {
        "psnr_db": psnr_db(model, heldout),
        "latent_mean": latents.mean(dim=(0, 2, 3)).tolist(),
        "latent_std": latents.std(dim=(0, 2, 3)).tolist(),
        "scaling_factor": model.config.scaling_factor,
    }
    save(model, record, state, root / "autoencoder")


def save(model: AutoencoderKL, record: dict, state: dict, out: Path) -> None:
    model.save_pretrained(out)
    record |= {"images": state["images"], "steps": state["step"], "hours": state["seconds"] / 3600}
    save_record(record | {"parameters": sum(p.numel() for p in model.parameters())}, out / "record.json")
    print(record, flush=True)
