"""LoRAs for few steps of a teacher, on it and carried over to its student: what both draw in two unguided steps.

    python benchmarks/step_lora.py runs/few-steps/distilled/seed-1

The run has a student of emoji-sd that was only distilled, such as `students.py few-steps.yaml` leaves. Trains the
LoRAs of step-lora.yaml on the teacher, carries each over with `prunet adapt`, and draws held-out prompts at equal
noise. Measures how near the prompt the pictures are (by emoji-clip), and how far from what the teacher draws in 25
guided steps. The same command resumes the training. Leaves step-lora.md and step-lora.png beside the LoRAs.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from students import finished

from prunet import Drawing, Teacher, adapt
from prunet.adapters.adapt import LORA_FILE
from prunet.disk.files import write_text
from prunet.evaluation.metrics import cosines
from prunet.evaluation.networks import Clip
from prunet.intervals import Measure, mean_of
from prunet.recipe.prompts import read_prompt_file
from prunet.runs.ablation import load_ablation
from prunet.sampling.draw import draw
from prunet.sampling.pictures import picture_rmse
from prunet.training.sheets import grid

MANY, SHOWN = Drawing(steps=25, guidance_scale=1.5), 8


def pictures_of(model: Path, lora: Path | None, prompts: list[str], how: Drawing) -> list[Image.Image]:
    """What a model draws, with a LoRA if there is one."""
    pipe = Teacher(model).pipeline()
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return list(draw(pipe, prompts, list(range(len(prompts))), how, batch_size=8))


def cell(found: Measure, form: str) -> str:
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the student")
    parser.add_argument("--arms", nargs="+", help="these of the ablation's LoRAs")
    parser.add_argument("--limit", type=int, default=108, help="prompts (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.set_defaults(precision="no")  # of the training; students.py has an option for it
    args = parser.parse_args()
    torch.set_num_threads(1)
    ablation, loaded = load_ablation("benchmarks/step-lora.yaml")
    recipes = {arm: recipe for (arm, _), recipe in loaded.items() if arm in (args.arms or [arm])}
    out, every = Path(ablation.output), list(loaded.values())
    teacher = Path(every[0].teacher.source)
    student = next(args.run.glob("measured-*/drawn-by"), args.run / "pipeline")
    few = next(iter(recipes.values())).made_for
    asked: dict[str, tuple[Path, Path | None, Any]] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        asked |= {f"{name}, 25 steps": (model, None, MANY), f"{name}, 2 steps": (model, None, few)}
        for arm, recipe in recipes.items():
            lora = finished(recipe, every, args).folder / "stage-1" / LORA_FILE
            if model == student:
                lora = Path(adapt(lora, args.run, out / f"{arm}-carried.safetensors")["output"])
            kind = f"carried {arm}" if model == student else arm
            asked[f"{name}, {kind} LoRA, 2 steps"] = (model, lora, recipe.made_for)
    prompts = read_prompt_file(Path("emoji/protocols/emoji-heldout.txt"))[: args.limit]
    scorer, rows = Clip.load(Path("emoji/emoji-clip")), {}
    lines = ["| | guidance | emoji-clip score | distance to the teacher's 25 steps |", "|---|---:|---:|---:|"]
    for name, (model, file, how) in asked.items():
        rows[name] = pictures_of(model, file, prompts, how)
        seen = scorer(rows[name], prompts)
        score = mean_of(cosines(*(np.asarray(seen[part]) for part in ("image", "text"))))
        apart = mean_of([picture_rmse(a, b) for a, b in zip(rows[name], rows["teacher, 25 steps"], strict=True)])
        guided = f"{how.guidance_scale:g}" if how.guidance_scale > 1 else "none"
        lines.append(f"| {name} | {guided} | {cell(score, '.3f')} | {cell(apart, '.4f')} |")
        print(lines[-1], flush=True)
        write_text(out / "step-lora.md", "\n".join(lines) + "\n")
        grid([row[:SHOWN] for row in rows.values()], list(rows), prompts[:SHOWN]).save(out / "step-lora.png")


if __name__ == "__main__":
    main()
