"""Examples of the arguments of each class of transformers.

Sizes are those of latents, before they are packed into tokens. The number of text tokens is the number that the
class's pipeline pads prompts to, or the most that it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: (height, width) of the latents of 480p video, and their number of frames (81 frames of video).
WAN_SIZE, WAN_FRAMES = (60, 104), 21
#: The guidance scale of Flux's pipeline.
USUAL_GUIDANCE = 3.5


@dataclass(frozen=True)
class Shape:
    """The shape, device and dtype of an example's latents (batch, channels, height, width)."""

    batch: int
    height: int
    width: int
    device: torch.device | str
    dtype: torch.dtype

    def zeros(self, *shape: int) -> Tensor:
        """Returns zeros of shape (batch, *shape)."""
        return torch.zeros(self.batch, *shape, device=self.device, dtype=self.dtype)

    def times(self, most: float) -> Tensor:
        """Returns a number for each sample: the most that the class's pipeline gives (a time, a guidance scale)."""
        return torch.full((self.batch,), most, device=self.device, dtype=self.dtype)

    def text_ids(self, count: int, axes: int) -> Tensor:
        """Returns the positions (count, axes) of text tokens for the rotary embedding."""
        return torch.zeros(count, axes, device=self.device, dtype=self.dtype)

    def packed_ids(self, axes: int) -> Tensor:
        """Returns the positions (tokens, axes) of 2x2 latents for the rotary embedding: rows and columns."""
        ids = torch.zeros(self.height // 2, self.width // 2, axes, device=self.device, dtype=self.dtype)
        ids[..., 1] = torch.arange(self.height // 2, device=self.device)[:, None]
        ids[..., 2] = torch.arange(self.width // 2, device=self.device)
        return ids.flatten(0, 1)

    def latents(self, channels: int) -> Tensor:
        """Returns latents (batch, channels, height, width)."""
        return self.zeros(channels, self.height, self.width)

    @property
    def packed(self) -> int:
        """The number of tokens of 2x2 latents."""
        return (self.height // 2) * (self.width // 2)


Inputs = Callable[[Any, Shape], dict[str, Any]]


def _usual(shape: Shape, latents: Tensor, tokens: int, width: int, last: float = 1.0) -> dict[str, Any]:
    """Returns latents, `tokens` embeddings of text and the `last` timestep under their usual names."""
    text = shape.zeros(tokens, width)
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": shape.times(last)}


def _guidance(config: Any, shape: Shape) -> dict[str, Any]:
    return {"guidance": shape.times(USUAL_GUIDANCE)} if config.guidance_embeds else {}


def flux(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Flux."""
    axes = len(config.axes_dims_rope)
    pooled = {"pooled_projections": shape.zeros(config.pooled_projection_dim)} if axes == 3 else {}
    return {
        **_usual(shape, shape.zeros(shape.packed, config.in_channels), 512, config.joint_attention_dim),
        "img_ids": shape.packed_ids(axes),
        "txt_ids": shape.text_ids(512, axes),
        **pooled,
        **_guidance(config, shape),
    }


def qwen_image(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Qwen-Image."""
    return {
        **_usual(shape, shape.zeros(shape.packed, config.in_channels), 512, config.joint_attention_dim),
        "img_shapes": [[(1, shape.height // 2, shape.width // 2)]] * shape.batch,
        **_guidance(config, shape),
    }


def sd3(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Stable Diffusion 3."""
    tokens = 77 + 256  # of CLIP and T5
    inputs = _usual(shape, shape.latents(config.in_channels), tokens, config.joint_attention_dim, 1000)
    return {**inputs, "pooled_projections": shape.zeros(config.pooled_projection_dim)}


def sana(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Sana."""
    sprint = config.guidance_embeds  # Sana-Sprint, whose times are from 0 to 1
    last = 1.0 if sprint else 1000 * config.get("timestep_scale", 1.0)
    inputs = _usual(shape, shape.latents(config.in_channels), 300, config.caption_channels, last)
    return inputs | ({"guidance": shape.times(4.5 * config.guidance_embeds_scale)} if sprint else {})


def pixart(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of PixArt."""
    inputs = _usual(shape, shape.latents(config.in_channels), 300, config.caption_channels, 1000)
    return {**inputs, "added_cond_kwargs": {"resolution": shape.zeros(2), "aspect_ratio": shape.zeros(1)}}


def z_image(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Z-Image."""
    return {
        "x": list(shape.zeros(config.in_channels, 1, shape.height, shape.width)),
        "t": shape.times(1),
        "cap_feats": list(shape.zeros(512, config.cap_feat_dim)),
    }


def lumina2(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Lumina 2."""
    mask = torch.ones(shape.batch, 256, device=shape.device, dtype=torch.bool)
    if mask.is_meta:  # the model reads the number of tokens from the mask, but a meta tensor has no contents
        mask.sum = lambda dim: torch.full((shape.batch,), 256)  # type: ignore[method-assign, assignment]
    inputs = _usual(shape, shape.latents(config.in_channels), 256, config.cap_feat_dim)
    return {**inputs, "encoder_attention_mask": mask}


def auraflow(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of AuraFlow."""
    return _usual(shape, shape.latents(config.in_channels), 256, config.joint_attention_dim)


def cogview4(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of CogView4."""
    inputs = _usual(shape, shape.latents(config.in_channels), 1024, config.text_embed_dim, 1000)
    return {**inputs, **{name: shape.zeros(2) for name in ("original_size", "target_size", "crop_coords")}}


def wan(config: Any, shape: Shape) -> dict[str, Any]:
    """Returns inputs of Wan."""
    latents = shape.zeros(config.in_channels, WAN_FRAMES, shape.height, shape.width)
    inputs = _usual(shape, latents, 512, config.text_dim, 1000)
    if "vace_in_channels" in config:
        inputs["control_hidden_states"] = shape.zeros(config.vace_in_channels, WAN_FRAMES, shape.height, shape.width)
    return inputs
