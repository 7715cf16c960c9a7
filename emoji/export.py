"""The last stage: the pipeline folder with its training record, the sheet of the fixed prompts, and the model card."""

import json
import shutil
from pathlib import Path

import torch
from card import write_card
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from shards import read_known_labels
from state import pick_device, read_record, save_record
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from prunet import Drawing, Model, generate
from prunet.teacher.text_names import save_text_encoder
from prunet.training.sheets import grid

SHEET_COLUMNS = 8
SAMPLER = "dpmsolver++"  # for all measures and sheets
PARTS = {  # folder in the state -> folder in the pipeline
    "autoencoder": "vae",
    "tokenizer": "tokenizer",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "unet": "unet",
}


def restore(shipped: Path, root: Path, parts: tuple[str, ...] = tuple(PARTS)) -> None:
    """Copies the parts that the state folder lacks from a pipeline folder, with their training records."""
    if not (shipped / "training.json").exists():
        raise SystemExit(f"{shipped} is not there, or holds no training.json: train it first")
    records = read_record(shipped / "training.json")
    for part in parts:
        if (root / part).exists() or not (shipped / PARTS[part]).exists():
            continue
        aside = root / f".{part}.part"  # renamed when it is whole, because an existing part is not checked again
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(shipped / PARTS[part], aside)
        if part in records:
            save_record(records[part], aside / "record.json")
        aside.rename(root / part)
    log = shipped / "training-log.jsonl"
    if "unet" in parts and log.exists() and not (root / "unet-log.jsonl").exists():
        shutil.copy(log, root / "unet-log.jsonl")


def make_scheduler(config: dict) -> DDIMScheduler:
    """SD v1 ships PNDM and SDXL Euler; DDIM here, whose config also tells other samplers not to clip."""
    return DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def assemble(config: dict, root: Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    parts = {
        "vae": AutoencoderKL.from_pretrained(root / "autoencoder"),
        "text_encoder": CLIPTextModel.from_pretrained(root / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(root / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(root / "unet"),
        "scheduler": make_scheduler(config["scheduler"]),
    }
    if (root / "text_encoder_2").exists():
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2")
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(root / "tokenizer")
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save_pipeline(pipe: DiffusionPipeline, out: Path) -> None:
    """Saves fp16 weights as the plain files: half the download, without the need to name a variant.

    Written aside and moved when they are whole; what else is in `out` stays.
    """
    aside = out / ".part"
    shutil.rmtree(aside, ignore_errors=True)
    pipe.to("cpu", torch.float16).save_pretrained(aside)
    for name in ("text_encoder", "text_encoder_2"):  # otherwise transformers 4 and ComfyUI would not know their names
        if getattr(pipe, name, None) is not None:
            save_text_encoder(getattr(pipe, name), aside / name)
    # vocab.json and merges.txt, the files that SD v1's tokenizer folder has
    for folder in aside.glob("tokenizer*"):
        pipe.tokenizer.backend_tokenizer.model.save(str(folder))
    for path in aside.glob("*/config.json"):
        settings = json.loads(path.read_text())
        settings.pop("_name_or_path", None)  # diffusers notes the folder that the weights were loaded from
        if "text_encoder" in path.parent.name:
            settings["dtype"] = "float32"  # else transformers loads fp16 beside an fp32 U-Net
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        path.replace(out / path.name)
    aside.rmdir()


def drawing(settings: dict) -> Drawing:
    """Returns how all measures and sheets of a teacher are drawn."""
    return Drawing(steps=settings["num_inference_steps"], guidance_scale=settings["guidance_scale"], sampler=SAMPLER)


def read_sheet_prompts() -> list[str]:
    """Returns 64 prompts, fixed before any training, evenly spread over the known labels, in alternating forms."""
    return (Path(__file__).parent / "sheet-prompts.txt").read_text().splitlines()


def export(config: dict, data: Path, root: Path, out: Path) -> None:
    save_pipeline(assemble(config, root), out)
    (out / "labels.txt").write_text("".join(f"{label}\n" for label in sorted(read_known_labels())))
    parts = [part for part in PARTS if (root / part / "record.json").exists()]
    save_record({part: read_record(root / part / "record.json") for part in parts}, out / "training.json")
    # A run that was killed and resumed may have measured one step twice.
    lines = (root / "unet-log.jsonl").read_text().splitlines()
    log = {json.loads(line)["step"]: line for line in lines}
    (out / "training-log.jsonl").write_text("".join(f"{line}\n" for line in log.values()))
    prompts, settings = read_sheet_prompts(), config["samples"]
    model = Model(out, device=pick_device())
    pictures = generate(model, prompts, drawing=drawing(settings), seed=settings["seed"])
    grid([pictures], [""], prompts, SHEET_COLUMNS).save(out / "samples.png", optimize=True)
    write_card(out, config)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    size_mb = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{size_mb:.1f} MB in {out}")
