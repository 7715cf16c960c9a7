"""How long a small machine takes from the prompt to the file: torch and OpenVINO, in 16 and in 8 bits.

    python benchmarks/edge.py sd-v1 bk-tiny --work edge       # SD v1.4's size, random weights, 512 px
    python benchmarks/edge.py emoji/emoji-sd bk-tiny          # the same in small
    python benchmarks/edge.py sd-v1 bk-tiny --teacher         # and the teacher at 25 guided steps, in all forms

The student draws without guidance, with a small decoder (`AutoencoderTiny`, random weights, so the pictures are
noise) in place of the VAE. The teacher draws with guidance and with its VAE. Each row is a process of its own (for
OpenVINO `examples/edge/draw.py`): the seconds until it is loaded and until its first picture, the median seconds of a
picture, and its peak memory. With `--teacher`, `chart.svg` beside the models compares both in all forms.

Making the models at SD v1.4's size takes 10 minutes, 10 GB of memory and 9 GB of disk, and with the teacher 40 minutes,
17 GB of memory and 13 GB of disk in all; `--work DIR` keeps them for the next time. Run it on a quiet machine.
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
#: Row -> its folder, and the precision of the computation; all but the first are for OpenVINO.
FORMS = {
    "torch": ("torch", "bf16"),
    "f32": ("openvino", "f32"),
    "bf16": ("openvino", "bf16"),
    "int8 weights": ("int8-weights", "bf16"),
    "int8": ("int8", "bf16"),
}
FOLDERS = {"student": "torch", "teacher": "teacher-torch"}
#: The teacher draws once in each of these numbers of steps, with guidance.
TEACHERS_STEPS, GUIDANCE = [5, 25], 7.5
PROMPTS = [f"a noto emoji of {thing}" for thing in ("dog", "car", "apple", "house")]
SHARE = "| {model} | {form} | {call:.3f} | {rest:.2f} | {rate:.0f} | {share:.0%} of {peak:.0f} in {kind} |"
ROW = "| {model} | {form} | {steps} | {loaded:.1f} | {first:.1f} | {seconds:.2f} | {memory:.0f} | {disk:.0f} |"


def alone(do: Callable, *args: Any) -> Any:
    """Calls a function in a new process, so that its memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(do, *args).result()


def make_student(source: str, plan: str, root: Path) -> None:
    """Writes the student as a pipeline of torch (`root/torch`), and a small decoder (`root/decoder`)."""
    from prunet import Teacher, build, export, load_plan
    from prunet.training.objectives.decoding import small_decoder

    if source == "sd-v1":
        source = str(root / FOLDERS["teacher"])
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


def make_openvino(model: Path, folder: Path, bits: str, guidance: float) -> None:
    """Writes a model for OpenVINO; 8 bits are calibrated in four steps, the teacher's too."""
    import torch

    from prunet.exports.openvino import export_openvino

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    decoder = model.parent / "decoder" if guidance == 1 else None
    how: dict = {"bits": None if bits == "openvino" else bits, "decoder": decoder, "card": {"teacher": "teacher"}}
    export_openvino(model, folder, PROMPTS, drawing(guidance), **how)


def drawing(guidance: float = 1):
    """Returns how the models draw: in few steps; the student without guidance."""
    from prunet.recipe.values import Drawing

    return Drawing(steps=4, guidance_scale=guidance, sampler="ddim-trailing" if guidance == 1 else "ddim")


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


def run(row: dict, root: Path, threads: int, repeat: int) -> dict[str, float]:
    """Times one process: seconds until loaded and until the first picture, median seconds of a picture, peak MB."""
    folder, steps = root / row["folder"], row["steps"]
    if row["form"] != "torch":
        command = [HERE.parent / "examples/edge/draw.py", folder, "a red apple", root / f"{folder.name}.png"]
        command += ["--steps", steps, "--threads", threads, "--repeat", repeat, "--precision", FORMS[row["form"]][1]]
        told = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True).stdout
    else:
        decoder, guidance = (root / "decoder", 1) if row["model"] == "student" else (None, GUIDANCE)
        told = alone(draw_with_torch, folder, decoder, steps, guidance, threads, repeat)
    found = {
        "loaded": r"loaded in ([\d.]+) s",
        "first": r"first picture after ([\d.]+) s",
        "seconds": r"steps in ([\d.]+) s",
        "memory": r"peak memory (\d+) MB",
    }
    return {name: float(re.search(pattern, told)[1]) for name, pattern in found.items()}


def peaks(threads: int) -> dict[str, float]:
    """Returns the operations a second (10^9) of large matrix products in torch, by precision; in f32 of a convolution,
    because torch's products of matrices can be slower in f32 than convolutions.
    """
    import torch

    torch.set_num_threads(threads)
    n, found = 2048, {}
    floats, whole = torch.randn(n, n).bfloat16(), torch.randint(-128, 127, (n, n), dtype=torch.int8)
    side, channels = 64, 483  # as many operations as the products have
    exact, kernels = (
        torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for shape in ((1, channels, side, side), (channels, channels, 3, 3))
    )
    for name, call in (
        ("f32", lambda: torch.nn.functional.conv2d(exact, kernels, padding=1)),
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


def shares(results: list[dict], root: Path, threads: int) -> list[dict]:
    """Returns for each model and form the seconds of a call of the denoiser (what each further step adds), of the rest,
    and the share of the machine's peak that the call reaches.
    """
    peak, found = alone(peaks, threads), []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in results):
        of = [row for row in results if (row["model"], row["form"]) == (model, form)]
        few, *_, many = sorted((row["steps"], row["seconds"]) for row in of)
        step = (many[1] - few[1]) / (many[0] - few[0])
        calls, kind = (2 if model == "teacher" else 1), {"f32": "f32", "int8": "int8"}.get(form, "bf16")
        rate = calls * alone(operations, root / FOLDERS[model]) / step
        call = {"call": step / calls, "rest": few[1] - few[0] * step, "rate": rate}
        found.append(
            {
                **max(of, key=lambda row: row["steps"]),
                **call,
                "share": rate / peak[kind],
                "peak": peak[kind],
                "kind": kind,
            }
        )
    return found


def chart(found: list[dict]) -> str:
    """Returns an SVG that compares models and forms, in the most steps of each; the teacher first."""
    from prunet.report.bars import Bar, Panel, draw_bars

    def panel(title: str, soft: str, key: str, kind: str, text: str) -> Panel:
        bars = [Bar(row["model"], [(kind, row[key])], text.format(row[key]), note=row["form"]) for row in found]
        return Panel(title, soft, bars, {})

    found = sorted(found, key=lambda row: row["model"] == "student")
    steps = {row["model"]: row["steps"] for row in found}
    guided = {"teacher": "guided steps", "student": "steps"}
    soft = "seconds; " + ", ".join(f"{model} in {count} {guided[model]}" for model, count in steps.items())
    rows = [
        [
            panel("A call of the U-Net", "seconds; guidance needs two in each step", "call", "throughput", "{:.2f}"),
            panel("A picture", soft, "seconds", "throughput", "{:.1f}"),
        ],
        [
            panel("Memory", "MB, peak of the process", "memory", "memory", "{:,.0f}"),
            panel("Size", "MB of all weights on disk", "disk", "memory", "{:,.0f}"),
        ],
    ]
    return draw_bars("Prune or quantise", "from the prompt to the file, in one process each", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="sd-v1 with random weights, or a pipeline folder")
    parser.add_argument("plan")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8], help="two or more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--teacher", action="store_true", help="also the teacher, with guidance, once in each form")
    parser.add_argument("--make", action="store_true", help="only make the models that are missing")
    parser.add_argument("--work", type=Path, help="keeps the models here; a temporary folder by default")
    args = parser.parse_args()
    if len(args.steps) < 2:
        parser.error("--steps: give two or more numbers, since a call is what a further step adds")
    root = args.work or Path(tempfile.mkdtemp(prefix="prunet-edge-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        measure(args, root)
    finally:
        if not args.work:
            shutil.rmtree(root, ignore_errors=True)


def rows_of(args: argparse.Namespace) -> list[dict]:
    """The rows: model, form, steps, and the folder that it draws from."""
    steps = {"student": args.steps, **({"teacher": TEACHERS_STEPS} if args.teacher else {})}
    return [
        {"model": model, "form": form, "steps": count, "folder": f"teacher-{bits}" if model == "teacher" else bits}
        for model, counts in steps.items()
        for count in counts
        for form, (bits, _) in FORMS.items()
    ]


def measure(args: argparse.Namespace, root: Path) -> None:
    """Makes the models that are missing, and prints the table."""
    made, asked = root / "made.json", {"source": args.source, "plan": args.plan}
    if made.exists() and json.loads(made.read_text()) != asked:
        sys.exit(f"--work {root}: holds the models of {made.read_text()}; give another folder")
    made.write_text(json.dumps(asked))
    if not (root / "torch").exists():
        alone(make_student, args.source, args.plan, root)
    if args.teacher and not (root / FOLDERS["teacher"]).exists():
        if args.source == "sd-v1":
            alone(make_teacher, root / FOLDERS["teacher"])
        else:
            (root / FOLDERS["teacher"]).symlink_to(Path(args.source).absolute())
    rows = rows_of(args)
    for row in rows:
        if not (root / row["folder"]).exists():
            guidance = 1 if row["model"] == "student" else GUIDANCE
            alone(make_openvino, root / FOLDERS[row["model"]], root / row["folder"], FORMS[row["form"]][0], guidance)
    if args.make:
        return
    print("| model | form | steps | loaded (s) | first picture (s) | a picture (s) | peak memory (MB) | weights (MB) |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    results = []
    for row in rows:
        files = [p for p in (root / row["folder"]).rglob("*") if p.suffix in (".bin", ".safetensors")]
        row |= {"disk": sum(path.stat().st_size for path in files) / 1e6}
        results.append(row | run(row, root, args.threads, args.repeat if row["model"] == "student" else 1))
        print(ROW.format(**results[-1]), flush=True)
    found = shares(results, root, args.threads)
    print("\n| model | form | a call (s) | the rest (s) | operations a second (10^9) | of the peak in |")
    print("|---|---|---:|---:|---:|---|")
    for one in found:
        print(SHARE.format(**one))
    if args.teacher:
        (root / "chart.svg").write_text(chart(found))
    print(json.dumps({"source": args.source, "plan": args.plan, "threads": args.threads, "rows": results}))


if __name__ == "__main__":
    main()
