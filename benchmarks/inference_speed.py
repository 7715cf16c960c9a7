"""How fast the published sizes draw: SD v1.4 or SDXL and the students of some plans, with random weights.

    python benchmarks/inference_speed.py sd-v1 bk-base bk-small bk-tiny --device cuda --compile
    python benchmarks/inference_speed.py sdxl ssd-1b vega --device cuda --batch-size 1 4

Does the work of `prunet bench` on machines without checkpoints. Writes bench.md, bench.svg and bench.json.
"""

import argparse
from pathlib import Path

import torch
from full_size import random_module, random_pipe

from prunet.cli.options import make_runtime
from prunet.denoisers.unet2d.form import make_unet
from prunet.errors import UserError
from prunet.plan.derived import derive
from prunet.plan.plan import load_plan
from prunet.report.speeds import markdown, write_speeds
from prunet.speed.bench import bench, check_compiler
from prunet.teacher.known import layout_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=["sd-v1", "sdxl"])
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="auto", choices=["auto", "no", "bf16", "fp16"])
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, default=Path("runs/inference-speed"))
    args = parser.parse_args()
    runtime = make_runtime(args.device, args.precision)
    derived = {plan: derive(layout_config(args.layout), load_plan(plan)) for plan in args.plans}
    if args.compile:
        check_compiler(runtime.torch_device)
    first = random_pipe(args.layout, runtime.dtype).to(runtime.torch_device)
    if args.layout == "sdxl":
        first.vae.to(torch.float32)  # its config asks for this
    first.vae.enable_slicing()
    pipelines = {args.layout: first}
    for plan, student in derived.items():
        net = random_module(lambda config=student.student_config: make_unet(config), runtime.dtype)
        parts = {**first.components, "unet": net.to(runtime.torch_device)}
        pipelines[plan] = type(first)(**parts, **({} if args.layout == "sdxl" else {"requires_safety_checker": False}))
    result = bench(
        pipelines,
        size=args.size,
        batch_sizes=args.batch_size,
        steps=args.steps,
        repeats=args.repeats,
        compiled=args.compile,
    )
    write_speeds(result, args.output)
    print(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
