"""Prune or quantise: a teacher and its students by OpenVINO, each in f32, bf16, 8-bit weights and 8 bits throughout.

    python benchmarks/prune_or_quantise.py emoji/emoji-sd emoji/emoji-sd-small runs/mine -o runs/prune-or-quantise

Writes a table (`table.md`), the numbers (`table.json`) and a chart (`chart.svg`). Each row is a process of its own: MB
of all models (in f32 twice those of 16 bits), seconds of one core for a picture (CPU time, which other work on the
machine hardly changes), by how much the process grows while it opens the folder and draws, the root mean squared error
to the teacher's pictures in f32 at equal noise, and what emoji-clip says of the pictures: the mean cosine with the
prompt, and R@1, the share whose nearest of all prompts is their own. A model draws as it was made for, else in 25 DDIM
steps with guidance 1.5.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from prunet import Teacher
from prunet.evaluation.networks import Clip
from prunet.exports.openvino import export_openvino
from prunet.recipe.values import Drawing
from prunet.report.bars import Bar, Panel, draw_bars
from prunet.sampling.made_for import made_for
from prunet.sampling.openvino import OpenVinoPipeline
from prunet.sampling.pictures import picture_rmse
from prunet.speed.clock import reset_peak, resident_kb

EMOJI = Path(__file__).parent.parent / "emoji"
#: Row -> the 8 bits of the folder, and the precision of the computation.
FORMS: dict[str, tuple[Literal["int8", "int8-weights"] | None, str]] = {
    "f32": (None, "f32"),
    "bf16": (None, "bf16"),
    "int8 weights": ("int8-weights", "bf16"),
    "int8": ("int8", "bf16"),
}
USUAL = Drawing(steps=25, guidance_scale=1.5, sampler="ddim")
#: Panels of the chart: title, what it shows, and the row's value. The colours are those of `prunet bench`.
PANELS = (
    ("Distance", "root mean squared error to the teacher's pictures", "distance", "missed", "{:.3f}"),
    ("Follows the prompt", "emoji-clip, R@1", "retrieval", "reached", "{:.0%}"),
    ("Size", "MB of all models", "mb", "memory", "{:.1f}"),
    ("Time", "seconds of one core for a picture", "seconds", "throughput", "{:.2f}"),
)


def draw(folder: Path, precision: str, prompts: list[str], to: Path) -> dict[str, float]:
    """Draws a picture of each prompt into `to`; called in a new process."""
    torch.set_num_threads(1)
    to.mkdir(parents=True, exist_ok=True)
    before = (resident_kb("VmRSS") or 0) if reset_peak() else 0
    pipe = OpenVinoPipeline(folder, precision)
    list(pipe.draw(prompts[:1], [0], pipe.made_for))
    began = time.process_time()
    for seed, picture in enumerate(pipe.draw(prompts, list(range(len(prompts))), pipe.made_for)):
        picture.save(to / f"{seed:04}.png")
    seconds = (time.process_time() - began) / len(prompts)
    return {"seconds": seconds, "memory": ((resident_kb("VmHWM") or 0) - before) * 1024 / 1e6}


def measured(pictures: list[Image.Image], teachers: list[Image.Image], clip: Any, texts: torch.Tensor) -> dict:
    images = F.normalize(clip.images(pictures), dim=-1)
    alike = images @ texts.T
    return {
        "distance": float(np.mean([picture_rmse(*pair) for pair in zip(pictures, teachers, strict=True)])),
        "score": alike.diagonal().mean().item(),
        "retrieval": (alike.argmax(1) == torch.arange(len(alike))).float().mean().item(),
    }


def chart(rows: list[dict]) -> str:
    panels = []
    for title, soft, key, kind, text in PANELS:
        # A shorter note leaves room for the model's name.
        notes = [row["form"].replace("int8 weights", "weights") for row in rows]
        named = zip(rows, notes, strict=True)
        bars = [Bar(row["model"], [(kind, row[key])], text.format(row[key]), note=note) for row, note in named]
        panels.append(Panel(title, soft, bars, {}))
    return draw_bars(
        "Prune or quantise",
        f"{rows[0]['pictures']} pictures of each; weights: these alone in 8 bits",
        [panels[:2], panels[2:]],
    )


def table(rows: list[dict]) -> str:
    head = "| model | form | MB | CPU s a picture | memory (MB) | distance | emoji-clip score | R@1 |"
    lines = [
        "| {model} | {form} | {mb:.1f} | {seconds:.2f} | {memory:.0f} | {distance:.3f} | {score:.3f} | "
        "{retrieval:.0%} |".format(**row)
        for row in rows
    ]
    return "\n".join([head, "|---|---|" + "---:|" * 6, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a pipeline folder")
    parser.add_argument("students", type=Path, nargs="*", help="pipeline folders, or run folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--prompts", type=Path, default=EMOJI / "protocols/emoji-train.txt")
    parser.add_argument("--limit", type=int, default=128, help="pictures of each row, spread over the prompts")
    args = parser.parse_args()
    every = args.prompts.read_text().splitlines()
    prompts = every[:: max(1, len(every) // args.limit)][: args.limit]
    torch.set_num_threads(1)
    clip = Clip.load(EMOJI / "emoji-clip")
    rows: list[dict] = []
    teachers: list[Image.Image] = []
    with torch.no_grad():
        texts = F.normalize(clip.texts(prompts), dim=-1)
        for model in (args.teacher, *args.students):
            source = model / "pipeline" if (model / "recipe.yaml").is_file() else model
            for form, (bits, precision) in FORMS.items():
                folder = args.output / model.name / (bits or "16-bits")
                if not folder.is_dir():
                    export_openvino(source, folder, every[1:9], made_for(Teacher(source)) or USUAL, bits=bits)
                drawn = args.output / model.name / f"pictures-{form.replace(' ', '-')}"
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    row = process.submit(draw, folder, precision, prompts, drawn).result()
                pictures: list[Image.Image] = [Image.open(path) for path in sorted(drawn.glob("*.png"))]
                teachers = teachers or pictures
                mb = sum(path.stat().st_size for path in folder.glob("*/openvino_model.bin")) / 1e6
                mb *= 2 if form == "f32" else 1  # the folder's weights are in 16 bits
                about = {"model": model.name, "form": form, "mb": mb, "pictures": len(prompts)}
                rows.append(row | about | measured(pictures, teachers, clip, texts))
                (args.output / "table.json").write_text(json.dumps(rows))
                (args.output / "table.md").write_text(table(rows))
                (args.output / "chart.svg").write_text(chart(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
