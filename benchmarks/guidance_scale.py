"""Pictures of a teacher and its students at several guidance scales, and their distance from the teacher's.

python benchmarks/guidance_scale.py emoji/emoji-sd RUN/pipeline OTHER/pipeline --prompts emoji/protocols/emoji-train.txt
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from prunet.recipe.recipe import read_prompts
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw, open_model
from prunet.sampling.pictures import picture_rmse
from prunet.training.sheets import grid


def drawn(source: str, prompts: list[str], how: Drawing) -> tuple[list[Image.Image], float, int]:
    """Returns a model's pictures, its CPU seconds for each, and the rows of a call for each picture."""
    pipe = open_model(source, only_draw=True).pipeline()
    rows: list[int] = []
    pipe.unet.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    pictures = list(draw(pipe, prompts[:1], [0], how))  # a warm-up
    began = time.process_time()
    pictures = list(draw(pipe, prompts, range(len(prompts)), how, batch_size=8))
    return pictures, (time.process_time() - began) / len(prompts), rows[0]


def main() -> None:
    """Prints the table and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of pipelines, the teacher first")
    parser.add_argument("--prompts", required=True, help="a text file with one a line")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2, 3])
    parser.add_argument("--sheet", type=Path, default=Path("guidance-scale.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = read_prompts(given.prompts)
    prompts = known[:: max(1, len(known) // given.limit)][: given.limit]
    rows, labels = [], []
    print("| model | guidance scale | rows of a call | CPU seconds of a picture | distance to the teacher |")
    print("|---|---:|---:|---:|---:|")
    for scale in given.scales:
        theirs: list[Image.Image] = []
        for model in given.models:
            how = Drawing(steps=given.steps, guidance_scale=scale)
            pictures, seconds, count = drawn(model, prompts, how)
            theirs = theirs or pictures
            apart = sum(map(picture_rmse, pictures, theirs)) / len(prompts)
            print(f"| {model} | {scale:g} | {count} | {seconds:.3f} | {apart:.4f} |", flush=True)
            rows.append(pictures[:8])
            labels.append(f"{Path(model).name} {scale:g}")
    grid(rows, labels, prompts[:8]).save(given.sheet)


if __name__ == "__main__":
    main()
