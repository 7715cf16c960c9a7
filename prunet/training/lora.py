"""A LoRA (arXiv 2106.09685): small matrices beside the attentions' frozen weights, made by peft."""

import importlib.util
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import ATTENTION_LAYERS, Architecture, Net, config_text
from prunet.denoisers.known import architecture_of
from prunet.errors import UserError


def add_lora(net: Net, rank: int, seed: int) -> Net:
    """Adds a LoRA to `net`, in place; only its weights then require a gradient. At first it does not change the output.

    Alpha equals the rank, so the LoRA's output is not scaled.
    """
    from peft import LoraConfig

    net.requires_grad_(False)
    targets = [end.removeprefix(".") for end in ATTENTION_LAYERS]  # those of diffusers' train_dreambooth_lora.py
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.add_adapter(config)
    return net


def trainable(net: Net, rank: int | None, seed: int) -> Net:
    """Lets all weights of `net` be trained, or those of a LoRA that is added to it; in place."""
    return net.requires_grad_(True) if rank is None else add_lora(net, rank, seed)


def merge_lora(net: Any) -> None:
    """Adds the LoRA of `add_lora` to the weights of its layers and removes it: `net` has its stock form again."""
    net.fuse_lora()
    net.unload_lora()


def lora_layers(net: Net) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps each layer to the matrices down (rank, in) and up (out, rank) that `add_lora` added."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(net)
    names = sorted(key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight"))
    found = {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}
    return {name: (down.detach().float().cpu(), up.detach().float().cpu()) for name, (down, up) in found.items()}


def check_rank(config: Mapping[str, Any], rank: int, key: str) -> None:
    """Refuses a LoRA that cannot be trained on a denoiser of `config`; `key` begins the message.

    Raises:
        UserError: peft is not installed, the denoiser has no attention left, or the LoRA would not be smaller than a
            layer that it changes.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{key}: needs peft, which is not installed: pip install 'prunet[personalize]'")
    sizes = [shape for name, shape in _weights(architecture_of(config), config_text(config)) if is_target(name)]
    if not sizes:
        raise UserError(f"{key}: a LoRA changes attentions, and this denoiser has none: leave it out")
    most = min(math.prod(shape) // sum(shape) for shape in sizes)
    if rank > most:
        raise UserError(
            f"{key} {rank}: a LoRA of this rank is larger than the smallest layer that it changes: give {most} at most"
        )


def trained_count(config: Mapping[str, Any], rank: int | None) -> int:
    """Counts the trained weights: all of a denoiser of `config`, or those of a LoRA of `rank`."""
    weights = _weights(architecture_of(config), config_text(config))
    if rank is None:
        return sum(math.prod(shape) for _, shape in weights)
    return sum(rank * sum(shape) for name, shape in weights if is_target(name))


def is_target(layer: str) -> bool:
    """Returns whether `add_lora` adds a LoRA to a layer of this name."""
    return layer.endswith(ATTENTION_LAYERS)


@lru_cache(maxsize=32)
def _weights(architecture: Architecture, text: str) -> list[tuple[str, tuple[int, ...]]]:
    net = architecture.skeleton(json.loads(text))
    return [(name.removesuffix(".weight"), tuple(parameter.shape)) for name, parameter in net.named_parameters()]
