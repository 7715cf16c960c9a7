"""Draws a picture with a folder of `prunet export RUN --openvino`, without torch and without prunet.

    pip install openvino-genai pillow
    python draw.py runs/demo/openvino-int8 "a noto emoji of red heart" picture.png

Prints the seconds from the start to the pipeline, and from the prompt to the file (the median of several pictures with
--repeat N), and the peak of the process's memory.
"""

import argparse
import ctypes
import json
import mmap
import resource
import statistics
import sys
import time
from pathlib import Path

began = time.perf_counter()
import openvino_genai  # noqa: E402
from PIL import Image  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("prompt")
parser.add_argument("output", type=Path, nargs="?", default=Path("picture.png"))
parser.add_argument("--steps", type=int, help="as the folder was made for by default")
parser.add_argument("--size", type=int, help="pixels; 8 times what the U-Net was made for by default")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--precision", default="bf16", help="f16 on ARM; f32 where a processor has neither")
parser.add_argument("--repeat", type=int, default=1)
given = parser.parse_args()

how = json.loads((given.folder / "model_index.json").read_text())["_made_for"]
steps = given.steps or how["steps"]
size = given.size or json.loads((given.folder / "openvino.json").read_text())["size"]
pipe = openvino_genai.Text2ImagePipeline(str(given.folder))
pipe.reshape(1, size, size, how["guidance_scale"])  # of one known size: a tenth faster, a tenth less memory
pipe.compile("CPU", INFERENCE_PRECISION_HINT=given.precision, INFERENCE_NUM_THREADS=given.threads)
# What is compiled has the weights once more, in its own order: on Linux the memory of the model files can be freed.
for line in Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else ():
    if f"{given.folder.resolve()}/" in line and line.split()[1].startswith("r--"):  # a page used again is read again
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
print(f"loaded in {time.perf_counter() - began:.2f} s")

seconds, drawing = [], {"num_inference_steps": steps, "guidance_scale": how["guidance_scale"]}
for seed in range(given.repeat):
    start = time.perf_counter()
    picture = pipe.generate(given.prompt, width=size, height=size, rng_seed=seed, **drawing)
    Image.fromarray(picture.data[0]).save(given.output)
    seconds.append(time.perf_counter() - start)
    if seed == 0:
        print(f"first picture after {time.perf_counter() - began:.2f} s")
print(f"{given.output}: {steps} steps in {statistics.median(seconds):.2f} s")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
print(f"peak memory {peak:.0f} MB, torch {'is' if 'torch' in sys.modules else 'is not'} imported")
