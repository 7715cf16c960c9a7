"""The largest micro-batch that distils within a memory budget, and how fast it is.

    python benchmarks/largest_batch.py sdxl --plan ssd-1b --budgets 24 48 80        # a GPU with at least 80 GB
    python benchmarks/largest_batch.py emoji --device cpu --budgets 1 2

Each try is prunet's loop of `distill_speed.py` in a process of its own that may not take more than the budget: a share
of the GPU's memory, or of a CPU process its data segment, libraries included. Options that are not named here go to it,
as `--gradient-checkpointing`. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["emoji", "sd-v1", "sdxl"])
    parser.add_argument("--plan", default="bk-small")
    parser.add_argument("--size", type=int, help="pixels; 128, 512 and 1024 by default")
    parser.add_argument("--budgets", type=float, nargs="+", default=[24, 48, 80], metavar="GB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, rest = parser.parse_known_args()

    from distill_speed import SIZES, make_teacher
    from small_models import make_pictures

    size = args.size or SIZES[args.model]
    found = []
    with tempfile.TemporaryDirectory(prefix="prunet-batch-") as text:
        folder = Path(text)
        make_pictures(folder / "pictures", max(BATCHES), size)
        teacher = make_teacher(args.model, folder)
        command = [sys.executable, str(HERE / "distill_speed.py"), args.model, "--loop", "prunet", "--plan", args.plan]
        command += ["--folder", str(folder), "--teacher", str(teacher), "--size", str(size), "--device", args.device]
        first = 0
        for budget in sorted(args.budgets):
            best = None
            for index in range(first, len(BATCHES)):
                tried = ["--batch", str(BATCHES[index]), "--budget", str(budget), *rest]
                done = subprocess.run([*command, *tried], capture_output=True, text=True)
                if done.returncode:
                    if "out of memory" not in done.stderr and "can't allocate memory" not in done.stderr:
                        raise SystemExit(done.stderr[-3000:])
                    break
                said = json.loads(done.stdout.splitlines()[-1])
                best = {"budget_gb": budget, "batch": BATCHES[index], **said}
                first = index  # a larger budget fits at least as much
                keep = ("images_per_s", "peak_memory_gb", "share_of_matmul_peak")
                print(f"{budget:g} GB, batch {BATCHES[index]}:", {k: round(said[k], 3) for k in keep}, flush=True)
            print(f"{budget:g} GB: " + (f"{best['batch']} at most" if best else "not even 1"), flush=True)
            found.append(best or {"budget_gb": budget, "batch": 0})
    print(json.dumps({"model": args.model, "plan": args.plan, "size": size, "device": args.device, "found": found}))


if __name__ == "__main__":
    main()
