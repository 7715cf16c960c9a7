"""Draws a picture with a folder of `prunet export RUN --onnx`, in NumPy and ONNX Runtime, without torch and diffusers.

pip install numpy onnxruntime pillow tokenizers
python draw_onnx.py runs/demo/onnx "a noto emoji of red heart" picture.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def draw(folder: Path, prompt: str, seed: int = 0) -> Image.Image:
    """Draws with the steps, guidance and sampler that the folder was made for: ddim, ddim-trailing or lcm."""
    index, size = read(folder / "model_index.json"), read(folder / "onnx.json")["size"]
    how, schedule = index["_made_for"], read(folder / "scheduler" / "scheduler_config.json")
    guidance, is_xl = how["guidance_scale"], (folder / "text_encoder_2").is_dir()
    guided = guidance > 1 and "guidance_range" not in how
    given = encode(folder, ["", prompt] if guided else [prompt])
    if is_xl:
        given["time_ids"] = np.float32([[size, size, 0, 0, size, size]]).repeat(1 + guided, 0)
        if guided and index.get("force_zeros_for_empty_prompt", True):
            for name in ("encoder_hidden_states", "text_embeds"):
                given[name][0] = 0
    if "guidance_range" in how:  # the U-Net takes the scale, embedded like a timestep, and needs no empty prompt
        angles = 1000 * (guidance - 1) * np.exp(np.arange(128) * -(np.log(10_000) / 127))
        given["timestep_cond"] = np.float32([[*np.sin(angles), *np.cos(angles)]])

    other = schedule.get("rescale_betas_zero_snr") or schedule.get("timestep_spacing") == "linspace"
    if other or schedule["beta_schedule"] != "scaled_linear":
        sys.exit(f"{folder}: a noise schedule that this program does not have: draw with `prunet generate`")
    betas = np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000, dtype=np.float32) ** 2
    kept = np.cumprod(1 - betas)  # the share of the picture in what is noisy, squared, at each timestep
    unet, decoder = model(folder / "unet"), model(folder / "vae_decoder")
    config = read(folder / "vae_decoder" / "config.json")
    side = size // 2 ** (len(config["block_out_channels"]) - 1)
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, 4, side, side), np.float32)
    for t, after in timesteps(how["sampler"], how["steps"], schedule):
        given |= {"sample": x.repeat(1 + guided, 0), "timestep": np.array([t])}
        out = unet.run(None, given)[0]
        out = out[:1] + guidance * (out[1:] - out[:1]) if guided else out
        a, last = kept[t], schedule.get("set_alpha_to_one", True) or how["sampler"] == "lcm"
        b = kept[after] if after >= 0 else np.float32(1) if last else kept[0]
        if schedule["prediction_type"] == "v_prediction":
            out = a**0.5 * out + (1 - a) ** 0.5 * x
        clean = (x - (1 - a) ** 0.5 * out) / a**0.5
        if how["sampler"] == "lcm":  # its boundary condition, and new noise
            s = np.float32(10 * t)
            clean = s / (s**2 + 0.25) ** 0.5 * clean + 0.25 / (s**2 + 0.25) * x
            out = random.standard_normal(x.shape, np.float32)
        x = b**0.5 * clean + (1 - b) ** 0.5 * out
    pixels = decoder.run(None, {"latent_sample": x / np.float32(config["scaling_factor"])})[0][0]
    return Image.fromarray(((pixels.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))


def encode(folder: Path, prompts: list[str]) -> dict[str, np.ndarray]:
    """Returns what the U-Net gets of prompts; SDXL's takes the last but one layer of two encoders."""
    found = []
    for path in sorted(folder.glob("text_encoder*")):
        tokenizer = Tokenizer.from_file(str(folder / path.name.replace("text_encoder", "tokenizer") / "tokenizer.json"))
        found.append(model(path).run(None, {"input_ids": np.array([tokenizer.encode(p).ids for p in prompts])}))
    if len(found) == 1:
        return {"encoder_hidden_states": found[0][0]}
    return {"encoder_hidden_states": np.concatenate([f[-2] for f in found], -1), "text_embeds": found[1][0]}


def timesteps(sampler: str, steps: int, schedule: dict[str, int]) -> list[tuple[int, int]]:
    """Returns for each step its timestep and the one after it, which is below 0 after the last; as diffusers counts."""
    if sampler == "lcm":
        learned = np.arange(50, 0, -1) * 20 - 1
        at = [int(learned[i]) for i in np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)]
        return list(zip(at, [*at[1:], -1], strict=True))
    stride = 1000 // steps
    if schedule.get("timestep_spacing") == "trailing":  # ddim-trailing, and ddim of some models
        at = [int(t) - 1 for t in np.round(np.arange(1000, 0, -1000 / steps))]
    else:
        at = [i * stride + schedule["steps_offset"] for i in reversed(range(steps))]
    return [(t, t - stride) for t in at]


def model(folder: Path) -> onnxruntime.InferenceSession:
    """Opens a model on the CPU."""
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def read(path: Path) -> dict:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2]).save(sys.argv[3])
    print(f"{sys.argv[3]}: torch {'is' if 'torch' in sys.modules else 'is not'} imported")
