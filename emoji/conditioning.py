"""The U-Net's inputs besides the noisy latents, computed as in the stock pipelines of SD v1 and SDXL."""

from pathlib import Path

import torch
from state import pick_device
from text import TextEncoder, read_text, tokenize
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 128


def load_encoders(root: Path) -> list[TextEncoder]:
    """Loads one encoder for the SD v1 layout, two for SDXL's."""
    encoders: list[TextEncoder] = [CLIPTextModel.from_pretrained(root / "text_encoder")]
    if (root / "text_encoder_2").exists():
        encoders.append(CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2"))
    return [encoder.eval().to(pick_device()) for encoder in encoders]


@torch.no_grad()
def encode_captions(root: Path, captions: list[str], batch_size: int = 128) -> dict[str, Tensor]:
    """Returns `prompts` (N, T, D) and, for SDXL, `pooled` (N, P), in fp16."""
    tokenizer, encoders = CLIPTokenizer.from_pretrained(root / "tokenizer"), load_encoders(root)
    parts: dict[str, list[Tensor]] = {"prompts": [], "pooled": []}
    for batch in tokenize(tokenizer, captions).split(batch_size):
        tokens = batch.to(encoders[0].device)
        if len(encoders) == 1:
            parts["prompts"].append(read_text(encoders[0], tokens)[0].half())
            continue
        # SDXL reads the last layer but one of both encoders, and the second encoder's projected end-of-text state.
        first = encoders[0](tokens, output_hidden_states=True).hidden_states[-2]
        second, pooled = read_text(encoders[1], tokens)
        parts["prompts"].append(torch.cat([first, second], dim=-1).half())
        parts["pooled"].append(pooled.half())
    return {name: torch.cat(values) for name, values in parts.items() if values}


def empty_condition(root: Path) -> dict[str, Tensor]:
    """Returns the condition of a dropped caption. SDXL's pipeline uses zeros (`force_zeros_for_empty_prompt`)."""
    empty = encode_captions(root, [""])
    return {name: torch.zeros_like(value) for name, value in empty.items()} if "pooled" in empty else empty


def unet_arguments(condition: dict[str, Tensor]) -> dict:
    """Returns keyword arguments of `UNet2DConditionModel.forward`, in fp32."""
    prompts = condition["prompts"].float()
    arguments: dict = {"encoder_hidden_states": prompts}
    if "pooled" in condition:
        # original size, crop corner, target size: no picture is cropped, and all have one size
        time_ids = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=prompts.device).repeat(len(prompts), 1)
        arguments["added_cond_kwargs"] = {"text_embeds": condition["pooled"].float(), "time_ids": time_ids}
    return arguments
