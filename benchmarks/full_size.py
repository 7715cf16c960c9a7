"""Runs the main job on models of the published sizes with random weights.

    python benchmarks/full_size.py sd-v1 bk-small            # SD v1.4 at 512 px, two steps, exported
    python benchmarks/full_size.py sdxl vega --size 1024 --steps 3 --level layer --precision bf16 \\
        --gradient-checkpointing --until distil              # SDXL in less than 24 GB

Prints the times, and the peak memory of distillation beside the estimate of `prunet estimate`. The last line is
JSON. Needs 24 GB of memory and about as much disk.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from small_models import make_pictures, make_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prunet import Run, Runtime, Teacher, export
from prunet.denoisers.unet2d.form import make_unet
from prunet.recipe.recipe import Recipe
from prunet.runs.estimate import memory
from prunet.speed.clock import reset_peak, resident_kb
from prunet.teacher.known import layout_config

torch.set_num_threads(os.cpu_count() or 1)  # tests/conftest.py sets one thread, which is enough only for small models

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT = {  # width, layers, heads, projection: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14
    "text_encoder": (768, 12, 12, 768),
    "text_encoder_2": (1280, 32, 20, 1280),
}


def random_module(make, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.nn.Module:
    """Fills small random weights without the slow initialisers."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.data.copy_(torch.arange(tensor.numel()).view_as(tensor))
    return module


def random_pipe(layout: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> DiffusionPipeline:
    """Makes a pipeline of the layout's full size."""
    sdxl = layout == "sdxl"

    def text(name: str, cls):
        width, layers, heads, projection = TEXT[name]
        config = CLIPTextConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            projection_dim=projection,
        )
        return random_module(lambda: cls(config), dtype, device)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder) / "tokenizer")
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = {
        "unet": random_module(lambda: make_unet(layout_config(layout)), dtype, device),
        "vae": random_module(lambda: AutoencoderKL(**VAE, force_upcast=sdxl), dtype, device),
        "text_encoder": text("text_encoder", CLIPTextModel),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    if sdxl:
        second = {"text_encoder_2": text("text_encoder_2", CLIPTextModelWithProjection), "tokenizer_2": tokenizer}
        return StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def random_pipeline(folder: Path, layout: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """The same, as safetensors."""
    random_pipe(layout, dtype, device).save_pretrained(folder, safe_serialization=True, max_shard_size="1TB")


def start_counting(device: torch.device) -> int:
    """Returns the bytes in use after freed memory is returned; `most_bytes` counts from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    return 1024 * (resident_kb("VmRSS") or 0)


def most_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * (resident_kb("VmHWM") or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=["sd-v1", "sdxl"])
    parser.add_argument("plan")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--level", default="block", help="of the feature losses (%(default)s)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--until", default="export", choices=["build", "cache", "distil", "export"])
    parser.add_argument("--folder", type=Path, help="where the models go; a temporary folder by default")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder, prefix="prunet-full-size-"))
    report: dict = {"layout": args.layout, "plan": args.plan, "size": args.size, "threads": torch.get_num_threads()}
    try:
        start = time.perf_counter()
        random_pipeline(root / "teacher", args.layout, torch.float16 if args.layout == "sdxl" else torch.float32)
        print(f"teacher: {time.perf_counter() - start:.0f} s")
        recipe = Recipe.model_validate(
            {
                "teacher": str(root / "teacher"),
                "plan": args.plan,
                "data": {"source": str(make_pictures(root / "pictures", 2, args.size)), "size": args.size},
                "stages": [{"steps": args.steps, "batch_size": 1, "ema_decay": None, "losses": {"level": args.level}}],
                "sheet": {"every": 0},
                "evaluation": {"prompts": ["a cat"], "steps": 1},
                "output": str(root / "run"),
            }
        )
        how = {"micro_batch": 1, "log_every": 1, "gradient_checkpointing": args.gradient_checkpointing}
        this = Run(recipe, Runtime(device=args.device, precision=args.precision, **how))
        # Export follows distillation directly, because the evaluation would draw for most of an hour on a CPU.
        for step in this.step_names("distil" if args.until == "export" else args.until):
            if step == "stage-1":
                report["estimated_gb"] = {k: round(v / 1e9, 2) for k, v in memory(this, 1).items()}
                this.teacher.release("unet", "vae", "text")
                before = start_counting(this.runtime.torch_device)
            start = time.perf_counter()
            this.do(step)
            report[f"{step}_s"] = round(time.perf_counter() - start, 1)
            if step == "stage-1":
                report["measured_gb"] = round(most_bytes(this.runtime.torch_device) / 1e9 - before / 1e9, 2)
                report["estimate_is"] = round(sum(report["estimated_gb"].values()) / report["measured_gb"], 3)
        if args.until == "export":
            start = time.perf_counter()
            export(Teacher(root / "teacher"), this.last_unet(), root / "pipeline")
            report["export_s"] = round(time.perf_counter() - start, 1)
        log = root / "run/stage-1/log.jsonl"
        report["losses"] = log.read_text().splitlines()[-1:] if log.is_file() else []
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    report["cores"] = os.cpu_count()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
