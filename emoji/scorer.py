"""Trains emoji-clip, a `transformers.CLIPModel`, on the training split, and measures its retrieval on all splits."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import embed
from shards import SPLITS, Sample, read_split, stack_images, to_model
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
from text import contrastive_loss, make_tokenizer, tokenize
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from prunet.evaluation.metrics import retrieved
from prunet.evaluation.networks import Clip

TEMPLATE = Path(__file__).with_name("emoji-clip-card.md")


def resize(images: Tensor, side: int) -> Tensor:
    """Resizes uint8 (B, 3, H, W) to (B, 3, side, side) in [-1, 1], like the preprocessor of the folder."""
    return F.interpolate(to_model(images), size=side, mode="bicubic", antialias=True).clamp(-1, 1)


def disturb(images: Tensor, dice: torch.Generator) -> Tensor:
    """Moves, scales, brightens and sometimes blurs pictures, like a denoiser's; never mirrors them, because of arrows.

    (B, 3, H, W) in [-1, 1] -> the same. The background stays white.
    """
    count, side = len(images), images.shape[-1]
    draw = torch.rand(6, count, generator=dice).to(images.device)
    scale, angle = 1 + 0.3 * (draw[0] - 0.4), 0.3 * (draw[1] - 0.5)
    shift = 0.2 * (draw[2:4] - 0.5)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # outside is 0, and 1 - 0 is white
    small = F.interpolate(F.avg_pool2d(moved, 2), size=side, mode="bilinear")
    moved = torch.where((draw[4] < 0.3)[:, None, None, None], small, moved)
    return 1 - (1 - moved) * (0.85 + 0.3 * draw[5])[:, None, None, None]


def make_model(config: dict, tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shared = {"projection_dim": config["projection_dim"]}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **config["text"], **ids, **shared
    )
    vision = CLIPVisionConfig(**config["vision"], **shared)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **shared))
    model.set_attn_implementation("eager")  # fused attention is slow on CPUs where heads are narrow
    torch.nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    return model


def train(config: dict, data: Path, root: Path, out: Path, seed: int) -> None:
    device, state_path = pick_device(), root / "scorer.pt"
    if is_finished(out / "training.json", config["minutes"]):
        return
    samples = read_split(data, "train")
    tokenizer = make_tokenizer(samples, data, config)
    images = resize(stack_images(samples).to(device), config["vision"]["image_size"])
    ids = [tokenize(tokenizer, sample.captions).to(device) for sample in samples]

    torch.manual_seed(seed)
    model = make_model(config, tokenizer).to(device)
    flat = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict] = [
        {"params": flat, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=config["weight_decay"])
    state = load_state(state_path)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    state["shown"] = {}

    for progress in timed_steps("scorer", state, config["minutes"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, config["learning_rate"])
        dice = torch.Generator().manual_seed(seed + state["step"])
        picked = torch.randperm(len(samples), generator=dice)[: config["batch_size"]]  # no picture twice
        choice = torch.rand(len(picked), generator=dice).tolist()
        tokens = torch.stack([ids[i][int(u * len(ids[i]))] for i, u in zip(picked.tolist(), choice, strict=True)])
        pictures = disturb(images[picked.to(device)], dice)

        with autocast(device):
            output = model(input_ids=tokens, pixel_values=pictures)
            loss = contrastive_loss(model.logit_scale, output.text_embeds, output.image_embeds)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        state["images"] += len(picked)
        if state["step"] % 10 == 0:
            state["shown"] = {"loss": smooth(state["shown"].get("loss"), loss.item(), 0.9)}
        if state["step"] % 200 == 199:
            save_state(state_path, state, model=model.state_dict(), optimizer=optimizer.state_dict())

    publish(model, tokenizer, data, state, out)


def retrieval(scorer: Clip, samples: list[Sample]) -> dict[str, float]:
    """Returns R@1 of pictures among the captions `label, style` of a split (at most a thousand), and that of chance."""
    samples = samples[:1000]
    captions = [sample.caption for sample in samples]
    found = retrieved(embed(scorer.images, [s.picture for s in samples]), embed(scorer.texts, captions)).mean()
    return {"pictures": len(samples), "captions": len(captions), "r_at_1": found, "chance": 1 / len(captions)}


def publish(model: CLIPModel, tokenizer: CLIPTokenizer, data: Path, state: dict, out: Path) -> None:
    """Writes fp16 weights with the dtype float32 in the config, tokenizer, preprocessing, measures and card."""
    model.half().save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
    side = model.config.vision_config.image_size
    half = [0.5, 0.5, 0.5]
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    measured = {split: retrieval(Clip.load(out), read_split(data, split)) for split in SPLITS}
    record = {"images": state["images"], "steps": state["step"], "hours": state["seconds"] / 3600}
    record |= {"parameters": sum(p.numel() for p in model.parameters()), "retrieval": measured}
    save_record(record, out / "training.json")
    rows = [
        f"| {split} | {row['pictures']} | {row['captions']} | {row['r_at_1']:.1%} | {row['chance']:.2%} |"
        for split, row in measured.items()
    ]
    card = TEMPLATE.read_text().format(rows="\n".join(rows), **record)
    (out / "README.md").write_text(card)
    print(json.dumps(record, indent=2), flush=True)
