"""Writes a LoRA that stock `load_lora_weights`, ComfyUI and the WebUIs read, and checks it with diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunet.console import quiet_libraries
from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.known import architecture_of

#: Key in the metadata of a LoRA of `prunet personalize`, which changes all attentions of its model.
PERSONALIZED = "prunet.personalized"
Layers = Mapping[str, tuple[Tensor, Tensor]]


def write_lora(layers: Layers, path: Path, part: str, metadata: Mapping[str, str]) -> None:
    """Writes a LoRA with kohya's names, the one format that all programs read.

    Args:
        layers: for each layer of the denoiser the matrices down (rank, in) and up (out, rank); up @ down is added.
        part: the denoiser's name in its pipeline (`unet`).
    """
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in layers.items():
        name = f"lora_{part}_{layer.replace('.', '_')}"
        # Alpha equals the rank, so the product is not scaled.
        alpha = torch.tensor(float(len(down)))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt", **metadata})


@quiet_libraries()
def check_lora(pipe: Any, net: Net, path: Path) -> None:
    """Loads the LoRA in a file into the stock pipeline `pipe`, and compares its denoiser's output with that of `net`.

    `net` has the LoRA as it was trained.

    Raises:
        RuntimeError: the outputs differ.
    """
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    config = config_of(net)
    inputs = architecture_of(config).random_inputs(config)
    with torch.no_grad():
        again, ours = pipe.unet(**inputs).sample, net(**inputs).sample
    if not torch.allclose(again, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max())):
        raise RuntimeError(f"{path}: the LoRA that diffusers loaded computes something else")
