"""Computes the memory of distillation at full size as `prunet estimate` does: no weights, no GPU, a minute a model.

    python benchmarks/memory.py sdxl vega koala-700m --size 1024 --micro-batch 1

Rows are plans in bf16, with the options that save memory one after another, as `prunet new` adds them. GB are 10^9
bytes.
"""

import argparse
from typing import Any

from prunet import Teacher, derive, load_plan
from prunet.recipe.stage import Losses, Stage
from prunet.runs.new import SAVING
from prunet.runtime import Runtime
from prunet.training.fit import training_memory
from prunet.training.memory import step_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="sd-v1, sd-v2 or sdxl")
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--level", default="layer", choices=["block", "layer", "attention"])
    given = parser.parse_args()
    config = Teacher(given.layout, only_form=True).unet_config
    latent = (given.size // 8, given.size // 8)
    stage = Stage(steps=1, batch_size=2 * given.micro_batch, losses=Losses(level=given.level))
    print(f"{given.layout}, {given.size} px, micro-batch {given.micro_batch}, level {given.level}\n")
    print("| plan | options | GB |\n|---|---|---:|")
    for name in given.plans:
        derived = derive(config, load_plan(name))
        for count in range(len(SAVING["cuda"]) + 1):
            chosen = SAVING["cuda"][:count]
            options: dict[str, Any] = dict.fromkeys(chosen, True)
            runtime = Runtime(device="cuda", precision="bf16", **options)
            parts = training_memory(config, derived.student_config, latent, given.micro_batch, stage, runtime)
            parts["activations"] = step_memory(
                config,
                derived.student_config,
                derived.pairs(given.level),
                latent_size=latent,
                micro_batch=given.micro_batch,
                accumulate=2,
                runtime=runtime,
            )
            title = f"`--{chosen[-1].replace('_', '-')}`" if chosen else "no option"
            print(f"| {name} | {title} | {sum(parts.values()) / 1e9:.1f} |", flush=True)


if __name__ == "__main__":
    main()
