"""How long a small machine takes from the prompt to the file: torch and OpenVINO, in 16 and in 8 bits.

    python benchmarks/edge.py sd-v1 bk-tiny                   # SD v1.4's size, random weights, 512 px; 10 GB of memory
    python benchmarks/edge.py emoji/emoji-sd bk-tiny          # the same in small
    python benchmarks/edge.py sd-v1 bk-tiny --teacher         # and the teacher at 25 guided steps in torch: minutes

The student draws without guidance, with a small decoder (`AutoencoderTiny`, random weights, so the pictures are
noise) in place of the VAE. Each row is a process of its own (for OpenVINO `examples/edge/draw.py`): the seconds until
it is loaded, the median seconds of a picture, and its peak memory. Run it on a quiet machine.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

BEGAN = time.perf_counter()
HERE = Path(__file__).parent
BITS: tuple[Literal["int8", "int8-weights"] | None, ...] = (None, "int8-weights", "int8")
ROW = "| {form} | {steps} | {loaded:.1f} | {seconds:.2f} | {memory:.0f} | {disk:.0f} |"


def make(source: str, plan: str, root: Path) -> list[str]:
    """Writes the student as a pipeline of torch and as folders for OpenVINO, whose names it returns."""
    from full_size import random_pipe

    from prunet import Teacher, build, export, load_plan
    from prunet.exports.openvino import export_openvino
    from prunet.recipe.values import Drawing
    from prunet.training.objectives.decoding import small_decoder

    if source == "sd-v1":
        import torch

        pipe = random_pipe("sd-v1", torch.float32)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            in_range(part)
        pipe.save_pretrained(root / "teacher", max_shard_size="1TB")
        del pipe
        source = str(root / "teacher")
    teacher = Teacher(source)
    drawing = Drawing(steps=4, guidance_scale=1, sampler="ddim-trailing")
    export(teacher, build(teacher, load_plan(plan)), root / "torch", drawing=drawing)
    small_decoder(teacher).save_pretrained(root / "decoder")
    prompts = [f"a noto emoji of {thing}" for thing in ("dog", "car", "apple", "house")]
    how: dict = {"decoder": root / "decoder", "card": {"teacher": source}}
    for bits in BITS:
        export_openvino(root / "torch", root / (bits or "openvino"), prompts, drawing, bits=bits, **how)
    return [bits or "openvino" for bits in BITS]


def in_range(module) -> None:
    """Random weights that keep activations in the range of trained ones."""
    for name, tensor in module.named_parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(std=tensor[0].numel() ** -0.5)
        elif name.endswith("weight"):
            tensor.data.fill_(1)


def draw_with_torch(folder: Path, decoder: Path | None, steps: int, guidance: float, threads: int, repeat: int) -> None:
    """What `examples/edge/draw.py` does, in torch and bf16."""
    import resource

    import torch
    from diffusers import AutoencoderTiny, DiffusionPipeline

    torch.set_num_threads(threads)
    vae = {"vae": AutoencoderTiny.from_pretrained(decoder, torch_dtype=torch.bfloat16)} if decoder else {}
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True, **vae)
    pipe.set_progress_bar_config(disable=True)
    print(f"loaded in {time.perf_counter() - BEGAN:.2f} s")
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        pipe("a red apple", num_inference_steps=steps, guidance_scale=guidance).images[0].save(
            folder.parent / "torch.png"
        )
        seconds.append(time.perf_counter() - start)
    print(f"{steps} steps in {statistics.median(seconds):.2f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def run(form: str, root: Path, steps: int, threads: int, repeat: int) -> dict[str, float]:
    """One process: seconds to load, median seconds of a picture, peak MB."""
    if form == "openvino" or form.startswith("int8"):
        command = [HERE.parent / "examples/edge/draw.py", root / form, "a red apple", root / f"{form}.png"]
        command += ["--steps", steps, "--threads", threads, "--repeat", repeat]
    else:
        decoder, guidance = (root / "decoder", 1) if form == "torch" else ("", 7.5)
        command = [__file__, "--draw", root / form, decoder, steps, guidance, threads, repeat]
    done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)
    found = (r"loaded in ([\d.]+) s", r"steps in ([\d.]+) s", r"peak memory (\d+) MB")
    loaded, seconds, memory = (float(re.search(pattern, done.stdout)[1]) for pattern in found)
    return {"loaded": loaded, "seconds": seconds, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="sd-v1 with random weights, or a pipeline folder")
    parser.add_argument("plan")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--teacher", action="store_true", help="also the teacher in torch, at 25 guided steps, once")
    parser.add_argument("--folder", type=Path, help="where the models go; a temporary folder by default")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder, prefix="prunet-edge-"))
    try:
        forms = make(args.source, args.plan, root)
        print("| runtime | steps | loaded (s) | a picture (s) | peak memory (MB) | weights (MB) |")
        print("|---|---:|---:|---:|---:|---:|")
        rows = [(form, steps, args.repeat) for steps in args.steps for form in ("torch", *forms)]
        if args.teacher:
            if args.source != "sd-v1":
                (root / "teacher").symlink_to(Path(args.source).absolute())
            rows.append(("teacher", 25, 1))
        results = []
        for form, steps, repeat in rows:
            files = [p for p in (root / form).rglob("*") if p.suffix in (".bin", ".safetensors")]
            row = {"form": form, "steps": steps, "disk": sum(path.stat().st_size for path in files) / 1e6}
            results.append(row | run(form, root, steps, args.threads, repeat))
            print(ROW.format(**results[-1]), flush=True)
        print(json.dumps({"source": args.source, "plan": args.plan, "threads": args.threads, "rows": results}))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        folder, decoder, steps, guidance, threads, repeat = sys.argv[2:]
        draw_with_torch(
            Path(folder), Path(decoder) if decoder else None, int(steps), float(guidance), int(threads), int(repeat)
        )
    else:
        main()
