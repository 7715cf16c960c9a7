"""How long a small machine takes from the prompt to the file: torch and OpenVINO, in 16 and in 8 bits.

    python benchmarks/edge.py sd-v1 bk-tiny --work edge       # SD v1.4's size, random weights, 512 px
    python benchmarks/edge.py emoji/emoji-sd bk-tiny          # the same in small
    python benchmarks/edge.py sd-v1 bk-tiny --teacher         # and the teacher at 25 guided steps in torch: minutes

The student draws without guidance, with a small decoder (`AutoencoderTiny`, random weights, so the pictures are
noise) in place of the VAE. Each row is a process of its own (for OpenVINO `examples/edge/draw.py`): the seconds until
it is loaded and until its first picture, the median seconds of a picture, and its peak memory. Making the models at SD
v1.4's size takes 10 minutes, 10 GB of memory and 9 GB of disk; `--work DIR` keeps them for the next time. Run it on a
quiet machine.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
HERE = Path(__file__).parent
FORMS = ("openvino", "int8-weights", "int8")
PROMPTS = [f"a noto emoji of {thing}" for thing in ("dog", "car", "apple", "house")]
ROW = "| {form} | {steps} | {loaded:.1f} | {first:.1f} | {seconds:.2f} | {memory:.0f} | {disk:.0f} |"


def alone(do: Callable, *args: Any) -> Any:
    """Calls a function in a new process, so that its memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(do, *args).result()


def make_student(source: str, plan: str, root: Path) -> None:
    """Writes the student as a pipeline of torch (`root/torch`), and a small decoder (`root/decoder`)."""
    from prunet import Teacher, build, export, load_plan
    from prunet.training.objectives.decoding import small_decoder

    if source == "sd-v1":
        source = str(root / "teacher")
        make_teacher(Path(source))
    teacher = Teacher(source)
    small_decoder(teacher).save_pretrained(root / "decoder")
    export(teacher, build(teacher, load_plan(plan)), root / "torch", drawing=drawing())


def make_teacher(folder: Path) -> None:
    """Writes a pipeline of SD v1.4's size with random weights that keep activations in the range of trained ones."""
    import torch
    from full_size import random_pipe

    pipe = random_pipe("sd-v1", torch.float32)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        in_range(part)
    pipe.save_pretrained(folder, max_shard_size="1TB")


def make_openvino(root: Path, form: str) -> None:
    """Writes the student for OpenVINO, in one of `FORMS`."""
    import torch

    from prunet.exports.openvino import export_openvino

    torch.set_num_threads(os.cpu_count() or 1)
    bits = None if form == "openvino" else form
    how: dict = {"bits": bits, "decoder": root / "decoder", "card": {"teacher": "teacher"}}
    export_openvino(root / "torch", root / form, PROMPTS, drawing(), **how)


def drawing():
    """Returns how the student draws: in few steps without guidance."""
    from prunet.recipe.values import Drawing

    return Drawing(steps=4, guidance_scale=1, sampler="ddim-trailing")


def in_range(module) -> None:
    """Fills random weights that keep activations in the range of trained ones."""
    for name, tensor in module.named_parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(std=tensor[0].numel() ** -0.5)
        elif name.endswith("weight"):
            tensor.data.fill_(1)


def draw_with_torch(folder: Path, decoder: Path | None, steps: int, guidance: float, threads: int, repeat: int) -> str:
    """Does the work of `examples/edge/draw.py`, in torch and bf16."""
    import resource

    import torch
    from diffusers import AutoencoderTiny, DiffusionPipeline

    torch.set_num_threads(threads)
    vae = {"vae": AutoencoderTiny.from_pretrained(decoder, torch_dtype=torch.bfloat16)} if decoder else {}
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True, **vae)
    pipe.set_progress_bar_config(disable=True)
    told = f"loaded in {time.perf_counter() - BEGAN:.2f} s\n"
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        picture = pipe("a red apple", num_inference_steps=steps, guidance_scale=guidance).images[0]
        picture.save(folder.parent / f"{folder.name}.png")
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            told += f"first picture after {time.perf_counter() - BEGAN:.2f} s\n"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return f"{told}{steps} steps in {statistics.median(seconds):.2f} s\npeak memory {peak:.0f} MB"


def run(form: str, root: Path, steps: int, threads: int, repeat: int) -> dict[str, float]:
    """Times one process: seconds until loaded and until the first picture, median seconds of a picture, peak MB."""
    if form in FORMS:
        command = [HERE.parent / "examples/edge/draw.py", root / form, "a red apple", root / f"{form}.png"]
        command += ["--steps", steps, "--threads", threads, "--repeat", repeat]
        told = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True).stdout
    else:
        decoder, guidance = (root / "decoder", 1) if form == "torch" else (None, 7.5)
        told = alone(draw_with_torch, root / form, decoder, steps, guidance, threads, repeat)
    found = {
        "loaded": r"loaded in ([\d.]+) s",
        "first": r"first picture after ([\d.]+) s",
        "seconds": r"steps in ([\d.]+) s",
        "memory": r"peak memory (\d+) MB",
    }
    return {name: float(re.search(pattern, told)[1]) for name, pattern in found.items()}


def peaks(threads: int) -> dict[str, float]:
    """Returns the operations a second (10^9) of large matrix products in torch's fastest precision."""
    import torch

    torch.set_num_threads(threads)
    n, found = 2048, {}
    floats, whole = torch.randn(n, n).bfloat16(), torch.randint(-128, 127, (n, n), dtype=torch.int8)
    for name, call in (
        ("bf16", lambda: torch.nn.functional.linear(floats, floats)),
        ("int8", lambda: torch._int_mm(whole, whole)),
    ):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = 2 * n**3 / min(times) / 1e9
    return found


def operations(folder: Path) -> float:
    """Returns the operations of a call of the denoiser (10^9; two for a multiply-add)."""
    from prunet.plan.size import macs_by_kind

    config = json.loads((folder / "unet/config.json").read_text())
    return 2 * sum(macs_by_kind(config).values()) / 1e9


def tell_shares(results: list[dict], root: Path, threads: int) -> None:
    """Prints the share of the machine's peak that the steps reach; the time of a step is the cost of one step more."""
    peak, work = alone(peaks, threads), alone(operations, root / "torch")
    print("\n| runtime | a step (s) | the rest (s) | operations a second (10^9) | of the peak in |")
    print("|---|---:|---:|---:|---|")
    for form in ("torch", *FORMS):
        few, *_, many = sorted((row["steps"], row["seconds"]) for row in results if row["form"] == form)
        step = (many[1] - few[1]) / (many[0] - few[0])
        kind = "int8" if form == "int8" else "bf16"
        share = f"{work / step / peak[kind]:.0%} of {peak[kind]:.0f} in {kind}"
        print(f"| {form} | {step:.3f} | {few[1] - few[0] * step:.2f} | {work / step:.0f} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="sd-v1 with random weights, or a pipeline folder")
    parser.add_argument("plan")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--teacher", action="store_true", help="also the teacher in torch, at 25 guided steps, once")
    parser.add_argument("--work", type=Path, help="keeps the models here; a temporary folder by default")
    args = parser.parse_args()
    root = args.work or Path(tempfile.mkdtemp(prefix="prunet-edge-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        measure(args, root)
    finally:
        if not args.work:
            shutil.rmtree(root, ignore_errors=True)


def measure(args: argparse.Namespace, root: Path) -> None:
    """Makes the models that are missing, and prints the table."""
    made, asked = root / "made.json", {"source": args.source, "plan": args.plan}
    if made.exists() and json.loads(made.read_text()) != asked:
        sys.exit(f"--work {root}: holds the models of {made.read_text()}; give another folder")
    made.write_text(json.dumps(asked))
    if not (root / "torch").exists():
        alone(make_student, args.source, args.plan, root)
    for form in FORMS:
        if not (root / form).exists():
            alone(make_openvino, root, form)
    print("| runtime | steps | loaded (s) | first picture (s) | a picture (s) | peak memory (MB) | weights (MB) |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = [(form, steps, args.repeat) for steps in args.steps for form in ("torch", *FORMS)]
    if args.teacher:
        if not (root / "teacher").exists():
            if args.source == "sd-v1":
                alone(make_teacher, root / "teacher")
            else:
                (root / "teacher").symlink_to(Path(args.source).absolute())
        rows.append(("teacher", 25, 1))
    results = []
    for form, steps, repeat in rows:
        files = [p for p in (root / form).rglob("*") if p.suffix in (".bin", ".safetensors")]
        row = {"form": form, "steps": steps, "disk": sum(path.stat().st_size for path in files) / 1e6}
        results.append(row | run(form, root, steps, args.threads, repeat))
        print(ROW.format(**results[-1]), flush=True)
    if len(args.steps) > 1:
        tell_shares(results, root, args.threads)
    print(json.dumps({"source": args.source, "plan": args.plan, "threads": args.threads, "rows": results}))


if __name__ == "__main__":
    main()
