"""Checks that stable-diffusion.cpp draws an exported student like diffusers, from the same noise.

    pip download --no-deps --no-binary :all: stable-diffusion-cpp-python && tar xf stable_diffusion_cpp_python-*.tar.gz
    cmake -S stable_diffusion_cpp_python-*/vendor/stable-diffusion.cpp -B build -DCMAKE_BUILD_TYPE=Release \\
        -DSD_WEBP=OFF -DSD_WEBM=OFF && cmake --build build --target sd-cli       # 10 minutes of two cores
    python benchmarks/sd_cpp.py build/bin/sd-cli PIPELINE         # a pipeline folder of SD v1's widths
    python benchmarks/sd_cpp.py build/bin/sd-cli sd-v1 bk-tiny    # or random weights of that size; 10 GB of memory

Each file (16 bits, q8_0, q4_0) draws the empty prompt, which needs no vocabulary, without guidance by Euler's method.
A row has its size, the seconds of the whole process, and the distance of its picture from that of diffusers in f32:
the mean difference of 255, and the correlation. With random weights the picture is noise, the most sensitive case.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image

from prunet import Teacher, build, export, load_plan
from prunet.exports.single_file import export_single_file

SEED = 1
FORMS: dict[str, dict] = {"f16": {"fp16": True}, "q8_0": {"bits": "q8_0"}, "q4_0": {"bits": "q4_0"}}


def make(plan: str, root: Path) -> Path:
    """Writes a student of full size with random weights as a pipeline."""
    from edge import in_range
    from full_size import random_pipe

    pipe = random_pipe("sd-v1", torch.float32)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        in_range(part)
    pipe.save_pretrained(root / "teacher", max_shard_size="1TB")
    del pipe
    teacher = Teacher(root / "teacher")
    return export(teacher, build(teacher, load_plan(plan)), root / "student")


@torch.no_grad()
def by_diffusers(folder: Path, size: int, steps: int) -> np.ndarray:
    """Draws the picture (height, width, 3) of an empty prompt from the noise of stable-diffusion.cpp's `--rng cpu`."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    ids = torch.tensor([[49406] + [49407] * 76])  # begin and end of CLIP's vocabulary
    given = {"prompt_embeds": pipe.text_encoder(ids).last_hidden_state}
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED))
    how = {"num_inference_steps": steps, "guidance_scale": 1, "height": size, "width": size, "output_type": "np"}
    return 255 * pipe(**given, latents=noise, **how).images[0]


def by_program(program: str, file: Path, size: int, steps: int) -> tuple[np.ndarray, float]:
    """Draws the same with stable-diffusion.cpp; returns the picture and the seconds of its process."""
    picture = file.with_suffix(".png")
    command = [program, "-m", file, "-p", "", "-o", picture, "-W", size, "-H", size, "--steps", steps, "-s", SEED]
    command += ["--cfg-scale", 1, "--sampling-method", "euler", "--scheduler", "discrete", "--rng", "cpu", "-t", 2]
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not picture.is_file():
        raise SystemExit(f"{file.name} does not draw:\n{(done.stdout + done.stderr)[-2000:]}")
    return np.asarray(Image.open(picture).convert("RGB"), dtype=np.float64), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="sd-cli of stable-diffusion.cpp")
    parser.add_argument("source", help="a pipeline folder, or sd-v1 with random weights")
    parser.add_argument("plan", nargs="?", default="bk-tiny")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="4, 10, 28, 38, 112 or 334, whose timesteps are whole")
    parser.add_argument("--keep", type=Path, help="a folder for the files and pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.keep) as made:
        root = args.keep or Path(made)
        folder = make(args.plan, Path(made)) if args.source == "sd-v1" else Path(args.source)
        expected = by_diffusers(folder, args.size, args.steps)
        Image.fromarray(expected.round().astype(np.uint8)).save(root / "diffusers.png")
        print("| file | MB | seconds | mean difference of 255 | correlation |\n|---|---:|---:|---:|---:|")
        for form, how in FORMS.items():
            path = root / f"student-{form}.{'gguf' if 'bits' in how else 'safetensors'}"
            file = export_single_file(folder, path, program="sd.cpp", **how)
            got, seconds = by_program(args.program, file, args.size, args.steps)
            apart, alike = abs(got - expected).mean(), np.corrcoef(got.ravel(), expected.ravel())[0, 1]
            print(
                f"| {form} | {file.stat().st_size / 1e6:.0f} | {seconds:.1f} | {apart:.2f} | {alike:.5f} |", flush=True
            )


if __name__ == "__main__":
    main()
