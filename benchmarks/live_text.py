"""Measures the cost of embedding captions while training (data.text: live) instead of caching the embeddings.

    python benchmarks/live_text.py                      # the shipped teachers, one CPU core

For each teacher the same distillation from both caches, in turn. The time is processor time, which
other programs on the machine disturb least. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from prunet import Run, Runtime, cache, distil, load_recipe

RECIPES = {"emoji/emoji-sd": "bk-small", "emoji/emoji-xl": "vega"}


def seconds_per_image(run: Run, folder: Path) -> float:
    """Returns the processor seconds of a distillation per image."""
    stage = run.recipe.stages[0]
    made = cache(run.teacher, run.recipe.data, folder.parent / run.recipe.data.text, seed=1)
    student = run._initial(run.derived)
    start = time.process_time()
    distil(run.teacher, student, run.pairs(1), made, stage, folder, runtime=run.runtime)
    return (time.process_time() - start) / (stage.steps * stage.batch_size)


def compare(teacher: str, plan: str, args: argparse.Namespace) -> dict[str, object]:
    """Returns the bytes of a sample in both caches, and the median ratio of their times with its range."""
    times: dict[str, list[float]] = {"cached": [], "live": []}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(args.rounds + 1):
            for text, found in times.items():
                stages = [{"steps": args.steps, "batch_size": args.batch, "ema_decay": None, "warmup_steps": 0}]
                data = {"source": "emoji/data/train-0000.tar", "limit": 64, "text": text}
                values: dict[str, object] = {"teacher": teacher, "plan": plan, "data": data, "stages": stages}
                values["output"] = f"{temporary}/run"
                run = Run(
                    load_recipe("demo", values=values), Runtime(device="cpu", precision="no", micro_batch=args.batch)
                )
                found.append(seconds_per_image(run, Path(temporary) / f"{text}-{turn}"))
                blocks = (Path(temporary) / text).glob("shard-*.safetensors")
                sizes[text] = sum(path.stat().st_size for path in blocks) // 64
    ratios = sorted(live / cached for cached, live in zip(times["cached"][1:], times["live"][1:], strict=True))
    return {"bytes_per_sample": sizes, "ratio": statistics.median(ratios), "from": ratios[0], "to": ratios[-1]}


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(Path(__file__).parent.parent)
    print(json.dumps({teacher: compare(teacher, plan, args) for teacher, plan in RECIPES.items()}))


if __name__ == "__main__":
    main()
