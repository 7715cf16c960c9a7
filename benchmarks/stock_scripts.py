"""Runs diffusers' own training scripts on an exported student, as a user without prunet does.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/stock_scripts.py diffusers --out stock

`train_dreambooth_lora.py` teaches a student a subject, and stock `load_lora_weights` loads the LoRA that it writes.
`train_controlnet.py` trains a ControlNet from the U-Net of another student (`bk-base`: diffusers has no ControlNet
without a mid block), and a stock pipeline draws with it. Both scripts run as they are, except for their check of
diffusers' version. Each picture shows the subject or the edges, a drawing without and a drawing with, at equal noise.
Needs torchvision and datasets.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from prunet.disk.files import write_text
from prunet.torchvision_ops import declare_torchvision_ops

declare_torchvision_ops()  # before anything imports diffusers

#: Runs a script with torchvision's transforms even where its compiled operators do not load.
RUN = """
import runpy, sys
from prunet.torchvision_ops import declare_torchvision_ops
declare_torchvision_ops()
import diffusers.utils
diffusers.utils.check_min_version = lambda version: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROMPT = "a photo of sks emoji"


def run_script(script: Path, *options: object) -> None:
    """Runs a script of diffusers in a new process, offline."""
    command = [sys.executable, "-c", RUN, str(script), *map(str, options)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


def subject(number: int) -> Image.Image:
    """Draws a subject that the teacher never saw: a striped ball of varying size and place."""
    picture, rng = Image.new("RGB", (128, 128), "white"), np.random.default_rng(number)
    side, (x, y) = int(rng.integers(60, 90)), rng.integers(8, 30, 2)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((x, y, x + side, y + side), fill=(20, 120, 60))
    for stripe in range(0, side, 16):
        draw.rectangle((x + stripe, y + side // 2 - 12, x + stripe + 7, y + side // 2 + 12), fill=(250, 210, 40))
    return picture


def edges(picture: Image.Image) -> Image.Image:
    return picture.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB")


def dreambooth(script: Path, student: Path, out: Path, steps: int) -> None:
    """Teaches the student a subject, and draws it with the LoRA and without, at equal noise."""
    pictures = out / "subject"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        subject(number).save(pictures / f"{number}.png")
    lora = out / "lora"
    options = ["--pretrained_model_name_or_path", student, "--instance_data_dir", pictures, "--instance_prompt", PROMPT]
    options += ["--output_dir", lora, "--resolution", 128, "--train_batch_size", 4, "--max_train_steps", steps]
    options += ["--learning_rate", "1e-3", "--rank", 8, "--seed", 1, "--report_to", "tensorboard"]
    run_script(script, *options)
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(student)
    sheet(out / "dreambooth.png", [subject(0), *(drawn(pipe, PROMPT, load) for load in (None, lora))])


def drawn(pipe: Any, prompt: str, lora: Path | None) -> Image.Image:
    if lora:
        pipe.load_lora_weights(lora)
    noise = torch.Generator().manual_seed(3)
    # The settings that the shipped student is made for.
    picture: Image.Image = pipe(prompt, num_inference_steps=2, guidance_scale=1, generator=noise).images[0]
    return picture


def controlnet(script: Path, student: Path, out: Path, steps: int) -> None:
    """Trains a ControlNet for edges, and draws with it and without, at equal noise."""
    control_data(Path("emoji/data/train-0000.tar"), out / "edges", 400)
    options = ["--pretrained_model_name_or_path", student, "--train_data_dir", out / "edges", "--resolution", 128]
    options += ["--output_dir", out / "control", "--train_batch_size", 8, "--max_train_steps", steps]
    options += [
        "--learning_rate",
        "1e-3",
        "--image_column",
        "image",
        "--conditioning_image_column",
        "conditioning_image",
    ]
    options += ["--caption_column", "text", "--seed", 1, "--report_to", "tensorboard", "--dataloader_num_workers", 0]
    run_script(script, *options)
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    control = ControlNetModel.from_pretrained(out / "control")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(student, controlnet=control)
    hint = edges(subject(0))
    asked = {"num_inference_steps": 25, "guidance_scale": 3, "image": hint}
    pictures = [
        pipe("red heart, 3d", **asked, controlnet_conditioning_scale=scale, generator=torch.Generator().manual_seed(3))
        for scale in (0.0, 1.0)
    ]
    sheet(out / "controlnet.png", [hint, *(given.images[0] for given in pictures)])


def control_data(shard: Path, folder: Path, count: int) -> None:
    """Writes pictures of the shipped data with edges and captions, in a folder that `load_dataset` reads."""
    from adapted_lora import read

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (picture, text) in enumerate(zip(*read(shard, count), strict=True)):
        picture.save(folder / f"{number}.png")
        edges(picture).save(folder / f"{number}-edges.png")
        names = {"file_name": f"{number}.png", "conditioning_image_file_name": f"{number}-edges.png"}
        rows.append(json.dumps({**names, "text": text}))
    write_text(folder / "metadata.jsonl", "\n".join(rows))


def sheet(path: Path, pictures: list[Image.Image]) -> None:
    row = Image.new("RGB", (132 * len(pictures), 128), "white")
    for number, picture in enumerate(pictures):
        row.paste(picture.resize((128, 128)), (132 * number, 0))
    row.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusers", type=Path, help="a checkout of diffusers")
    parser.add_argument("--student", type=Path, default=Path("emoji/emoji-sd-small"), help="an exported student")
    parser.add_argument("--out", type=Path, default=Path("stock"))
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    from prunet import Teacher, build, export, load_plan

    args.out.mkdir(parents=True, exist_ok=True)
    dreambooth(args.diffusers / "examples/dreambooth/train_dreambooth_lora.py", args.student, args.out, args.steps)
    teacher = Teacher("emoji/emoji-sd")
    base = export(teacher, build(teacher, load_plan("bk-base")), args.out / "bk-base")
    controlnet(args.diffusers / "examples/controlnet/train_controlnet.py", base, args.out, args.steps)


if __name__ == "__main__":
    main()
