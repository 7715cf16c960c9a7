"""Stage 4: the pipeline folder, its labels, a sheet of samples and a model card with measured numbers."""

import json
import shutil
from pathlib import Path

import torch
from card import write_card
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from rich.progress import track
from shards import read_split
from transformers import CLIPTextModel, CLIPTokenizer

SHEET_COLUMNS = 8


def make_scheduler(config: dict) -> DDIMScheduler:
    """SD v1's schedule. DDIM, because its config also holds what other samplers need to know: no clipping."""
    return DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def assemble(config: dict, root: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(root / "autoencoder"),
        text_encoder=CLIPTextModel.from_pretrained(root / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(root / "unet"),
        scheduler=make_scheduler(config["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipe: StableDiffusionPipeline, out: Path) -> None:
    """fp16 weights as the plain files: half the download, and nobody has to know about variants."""
    pipe.to(torch.float16).save_pretrained(out)
    # vocab.json and merges.txt, the files that SD v1's tokenizer folder has
    pipe.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    # diffusers notes the folder that the weights were loaded from
    for path in out.glob("*/config.json"):
        settings = json.loads(path.read_text())
        settings.pop("_name_or_path", None)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def round_weights(pipe: StableDiffusionPipeline) -> None:
    """What is drawn and measured must be what is shipped, also on CPUs that cannot compute in fp16."""
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half().float()


def draw(pipe: StableDiffusionPipeline, prompts: list[str], config: dict, batch_size: int = 8) -> list[Image.Image]:
    """One seed per picture, from its place in the list: sheets of two models can be compared."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in track(range(0, len(prompts), batch_size), description="drawing"):
        batch = prompts[start : start + batch_size]
        dice = [torch.Generator().manual_seed(config["seed"] + start + i) for i in range(len(batch))]
        steps, scale = config["num_inference_steps"], config["guidance_scale"]
        images += pipe(batch, guidance_scale=scale, num_inference_steps=steps, generator=dice).images
    return images


def make_sheet(images: list[Image.Image], titles: list[str], columns: int = SHEET_COLUMNS) -> Image.Image:
    side, text_height = images[0].width, 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = index % columns * side, index // columns * (side + text_height)
        sheet.paste(image, (x, y + text_height))
        pen.text((x + 3, y + 1), title[: side // 6], fill="black")
    return sheet


def sample_prompts(labels: list[str], count: int = 40) -> list[str]:
    """Evenly spread over the known labels, not picked by hand; the styles take turns."""
    picked = [labels[int(i * len(labels) / count)].lower() for i in range(min(count, len(labels)))]
    forms = ("{}", "{}, 3d", "{}, noto", "{}, flat")
    return [forms[i % len(forms)].format(label) for i, label in enumerate(picked)]


def export(config: dict, data: Path, root: Path, out: Path) -> None:
    pipe = assemble(config, root)
    round_weights(pipe)
    labels = (root / "labels.txt").read_text().splitlines()
    prompts = sample_prompts(labels)
    images = draw(pipe, prompts, config["samples"])
    save_pipeline(pipe, out)
    shutil.copy(root / "labels.txt", out / "labels.txt")
    make_sheet(images, prompts).save(out / "samples.png", optimize=True)
    parts = ("autoencoder", "text_encoder", "unet")
    records = {part: json.loads((root / part / "record.json").read_text()) for part in parts}
    num_heldout = sum(len(read_split(data, split)) for split in ("heldout-combinations", "heldout-labels"))
    write_card(out, config, records, labels, num_heldout)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    size_mb = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{size_mb:.1f} MB in {out}")
