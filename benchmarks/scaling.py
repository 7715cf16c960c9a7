"""Distillation by several processes: the cost of the messages between them, and a test of the simple model of it.

    python benchmarks/scaling.py                        # two CPU processes, the shipped teacher
    python benchmarks/scaling.py --processes 8 --device cuda --batch 256 --recipe mine.yaml

In turn, at equal total batch: one process with as many threads; as many processes that do not talk to each other, each
with its share of the batch (what the hardware could do at best); DDP; FSDP2. The model: a step takes as long as it does
without messages, and beside it the gradients are averaged at the speed that an all-reduce of their size has by itself;
what of that is not hidden behind the backward pass is added. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def distil(args: argparse.Namespace, folder: Path, name: str, processes: int, batch: int, *options: str) -> dict:
    """Starts `prunet distil` with `processes` together, or ("apart") one that does not know of others."""
    sets = {"output": folder / name, "cache": folder / "cache", "stages.0.batch_size": batch}
    sets |= {"stages.0.steps": args.steps, "sheet.every": 0, "checkpoint_every": 10**6, "data.limit": 256}
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "prunet", "distil", str(args.recipe), "--device", args.device]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(str(value))}")]
    return {"command": [*command, *options], "log": folder / name / "stage-1" / "log.jsonl", "batch": batch}


def together(runs: list[dict], threads: int) -> float:
    """Returns the images a second of commands started at once: the median of each one's rows after the first."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = [subprocess.Popen(run["command"], env=env, stderr=subprocess.DEVNULL) for run in runs]
    if any(process.wait() for process in started):
        raise SystemExit(f"failed: {' '.join(runs[0]['command'])}")
    total = 0.0
    for run in runs:
        speeds = sorted(json.loads(line)["images_per_s"] for line in run["log"].read_text().splitlines()[1:])
        total += speeds[len(speeds) // 2]
    return total


def all_reduce(count: int, device: str) -> None:
    """Runs in every process: times the mean of `count` fp32 numbers, the best of five."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    values, times = torch.ones(count, device=state.device), []
    for _ in range(6):
        state.wait_for_everyone()
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if state.is_main_process:
        print(json.dumps(min(times)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "emoji-sd.yaml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="of all processes together (%(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--all-reduce", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.all_reduce:
        return all_reduce(args.all_reduce, args.device)

    from prunet import load_recipe
    from prunet.runs.run import Run

    count = Run(load_recipe(args.recipe)).derived.student_size.parameters
    n, share = args.processes, args.batch // args.processes
    with tempfile.TemporaryDirectory(prefix="prunet-scaling-") as text:
        folder = Path(text)
        together([distil(args, folder, "first", 1, share)], n)  # makes the cache
        cpu = args.device == "cpu"
        found = {"one process": together([distil(args, folder, "one", 1, args.batch)], n)} if cpu else {}
        apart = [distil(args, folder, f"apart-{i}", 1, share) for i in range(n)]
        if not cpu:
            for i, run in enumerate(apart):
                run["command"][run["command"].index("cuda")] = f"cuda:{i}"
        found["apart"] = together(apart, 1)
        found["DDP"] = together([distil(args, folder, "ddp", n, args.batch)], 1)
        found["FSDP2"] = together([distil(args, folder, "fsdp", n, args.batch, "--fsdp")], 1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__]
    reduce = [*launch, "--all-reduce", str(count), "--device", args.device]
    done = subprocess.run(
        reduce, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    step = args.batch / found["apart"]
    for name, speed in found.items():
        print(f"{name:12} {speed:8.1f} images/s  {args.batch / speed * 1000:8.1f} ms a step")
    print(f"messages: {4 * count / 1e6:.1f} MB of gradients, {1000 * seconds:.1f} ms, {seconds / step:.0%} of a step")
    cost = found["apart"] / found["DDP"] - 1
    print(f"DDP: {cost:+.1%} time; the model says between 0 (all messages hidden) and {seconds / step:.1%} (none)")
    said = {
        "processes": n,
        "batch": args.batch,
        "device": args.device,
        "images_per_s": found,
        "gradient_bytes": 4 * count,
    }
    print(json.dumps({**said, "all_reduce_s": seconds, "step_s": step, "ddp_overhead": cost}))
    return None


if __name__ == "__main__":
    main()
