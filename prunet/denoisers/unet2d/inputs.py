"""The arguments of a U-Net, examples of them, and the size that it was made for."""

from collections.abc import Mapping
from typing import Any

import torch

from prunet.denoisers.condition import Condition
from prunet.denoisers.unet2d.guidance import WIDTH, guidance_embedding, takes_guidance

TEXT_TOKENS = 77


def native_latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (height, width) of the latents that the model was made for."""
    size = config.get("sample_size") or 64
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def example_inputs(
    config: Mapping[str, Any],
    batch_size: int = 1,
    *,
    latent_size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Returns arguments for the denoiser's `forward`: zeros (or meta tensors) of the right shapes.

    `sample` (B, C, h, w), `timestep` (B,), `encoder_hidden_states` (B, 77, D), for SDXL `added_cond_kwargs` with
    `text_embeds` (B, P) and `time_ids` (B, 6), and if it takes the guidance scale `timestep_cond` (B, 256).
    """
    height, width = latent_size or native_latent_size(config)
    dim = config["cross_attention_dim"]
    dim = dim[0] if isinstance(dim, list | tuple) else dim
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch_size, config.get("in_channels", 4), height, width, device=device, dtype=dtype),
        "timestep": torch.zeros(batch_size, device=device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch_size, TEXT_TOKENS, dim, device=device, dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch_size, pooled, device=device, dtype=dtype),
            "time_ids": torch.zeros(batch_size, 6, device=device, dtype=dtype),
        }
    if takes_guidance(config):
        inputs["timestep_cond"] = torch.zeros(batch_size, WIDTH, device=device, dtype=dtype)
    return inputs


def arguments(condition: Condition, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword arguments for a condition; `dtype`: that of the latents."""
    known: dict[str, Any] = {"encoder_hidden_states": condition["prompt_embeds"]}
    if "pooled" in condition:
        known["added_cond_kwargs"] = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    if "guidance_scale" in condition:
        known["timestep_cond"] = guidance_embedding(condition["guidance_scale"]).to(dtype)
    return known
