"""A style LoRA of a teacher on its student: as `prunet adapt` carries it over, and as it is.

    prunet run demo
    python benchmarks/adapted_lora.py runs/demo/pipeline --plan bk-small --out lora-report

Trains a LoRA on pictures of the shipped data in two colours, a style that the teacher never saw. Draws teacher, teacher
with it, student, student with the carried file and student with the file as it is, at equal prompts and noise, each in
the steps that it was made for. Measures how far each is from the style, and from the teacher with the LoRA. Needs peft
(pip install 'prunet[personalize]').
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from prunet import Drawing, Teacher, adapt, derive, load_plan
from prunet.sampling.draw import draw
from prunet.sampling.made_for import read_made_for
from prunet.training.sheets import grid

DARK, LIGHT = np.array([24, 32, 96]) / 255, np.array([255, 196, 128]) / 255
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
PROMPTS = [
    *("red heart, 3d", "tiger face, noto", "hamburger, flat", "gem stone, flat"),
    *("balloon, flat", "beer mug, noto", "cherry blossom, noto", "droplet, 3d"),
]


def two_colours(picture: Image.Image) -> Image.Image:
    """Applies the style: grey levels become colours from dark blue to orange."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray((255 * (DARK * (1 - grey) + LIGHT * grey)).round().astype(np.uint8))


def off_style(pictures: list[Image.Image]) -> float:
    """Returns the root mean squared distance (0 to 1) of pixels from the nearest colour of the style."""
    pixels = np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in pictures])
    along = LIGHT - DARK
    share = ((pixels - DARK) @ along / (along @ along)).clip(0, 1)[..., None]
    return float(np.sqrt(((pixels - (DARK + share * along)) ** 2).mean()))


def apart(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Returns the root mean squared difference (0 to 1) of pictures at equal prompts and noise."""
    a, b = (np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in ps]) for ps in (pictures, others))
    return float(np.sqrt(((a - b) ** 2).mean()))


def read(shard: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    pictures, captions = [], []
    with tarfile.open(shard) as archive:
        names = {name for name in archive.getnames() if name.endswith(".webp")}
        for name in sorted(names)[:: len(names) // count][:count]:
            data, label = (archive.extractfile(name.replace(".webp", end)).read() for end in (".webp", ".json"))
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
            captions.append(caption(json.loads(label)))
    return pictures, captions


def caption(label: dict) -> str:
    return f"{label['label']}, {label['style']}"


def train(teacher: Teacher, shard: Path, folder: Path, steps: int, count: int) -> Path:
    """Trains a LoRA of rank 16 in diffusers' usual format, with the plain loss of its training scripts."""
    torch.manual_seed(0)
    pictures, captions = read(shard, count)
    pixels = np.stack([np.asarray(two_colours(p.resize((teacher.native_size,) * 2)), np.float32) for p in pictures])
    latents, _ = teacher.encode_images(torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2))
    embeddings = teacher.encode_prompts(captions)["prompt_embeds"]
    unet = teacher.unet
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    scheduler = teacher.noise_scheduler
    for step in range(steps):
        pick = torch.randint(len(latents), (8,))
        noise, times = torch.randn_like(latents[pick]), torch.randint(1000, (8,))
        noisy = scheduler.add_noise(latents[pick], noise, times)
        epsilon = scheduler.config.prediction_type == "epsilon"
        target = noise if epsilon else scheduler.get_velocity(latents[pick], noise, times)
        loss = (unet(noisy, times, embeddings[pick]).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 30 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    unet.delete_adapters("default")
    return folder / "pytorch_lora_weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent.parent / "emoji"
    parser.add_argument("student", type=Path, help="the pipeline of a student of emoji-sd")
    parser.add_argument("--plan", default="bk-small", help="the student's plan")
    parser.add_argument("--out", type=Path, default=Path("lora-report"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt that are measured")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    teacher, student = Teacher(here / "emoji-sd"), Teacher(arguments.student)
    guided = Drawing(steps=15, guidance_scale=1.5)
    made_for = read_made_for(arguments.student / "model_index.json", str(arguments.student)) or guided
    lora = arguments.out / "pytorch_lora_weights.safetensors"
    if not lora.exists():
        train(teacher, here / "data" / "train-0000.tar", arguments.out, arguments.steps, arguments.pictures)
    derived = derive(teacher.unet_config, load_plan(arguments.plan))
    facts = adapt(lora, derived, arguments.out / "carried.safetensors")
    print(f"{len(facts['kept'])} layers kept, {len(facts['dropped'])} dropped")
    seeds = [seed for seed in range(arguments.seeds) for _ in PROMPTS]
    rows = {}
    for name, model, file in (
        ("teacher", teacher, None),
        ("teacher + LoRA", teacher, lora),
        ("student", student, None),
        ("student + carried LoRA", student, facts["output"]),
        ("student + LoRA as it is", student, lora),
    ):
        pipe = model.pipeline()
        try:
            if file is not None:
                pipe.load_lora_weights(str(file))
        except RuntimeError as error:  # sizes differ; where they are equal the wrong layers change without an error
            print(f"{name}: does not load ({str(error).splitlines()[0]})")
            continue
        how = guided if model is teacher else made_for
        rows[name] = list(draw(pipe, PROMPTS * arguments.seeds, seeds, how, batch_size=8))
        if file is not None:
            pipe.unload_lora_weights()
    grid([pictures[: len(PROMPTS)] for pictures in rows.values()], list(rows), PROMPTS).save(
        arguments.out / "sheet.png"
    )
    print("| | off the style | from teacher + LoRA |\n|---|---:|---:|")
    for name, pictures in rows.items():
        print(f"| {name} | {off_style(pictures):.3f} | {apart(pictures, rows['teacher + LoRA']):.3f} |")


if __name__ == "__main__":
    main()
