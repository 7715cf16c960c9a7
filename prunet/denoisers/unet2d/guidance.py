"""The guidance scale as an input of a U-Net, whose single call then gives the guided output (arXiv 2210.03142, 3.1).

diffusers' U-Nets with `time_cond_proj_dim` add a linear map of the scale's sinusoidal embedding to the embedding of the
timestep. Stock pipelines give them their `guidance_scale`, and call them once a step, as those of LCM.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.form import Form

KEY, WIDTH = "time_cond_proj_dim", 256
WEIGHT = "time_embedding.cond_proj.weight"


def takes_guidance(config: Mapping[str, Any]) -> bool:
    """Returns whether the U-Net of `config` takes the guidance scale as an input."""
    return config.get(KEY) is not None


def with_guidance(form: Form) -> Form:
    """Returns the form of the same student that takes the guidance scale as an input."""
    return replace(form, config=form.config | {KEY: WIDTH}, new=(*form.new, WEIGHT))


def guidance_embedding(scale: Tensor) -> Tensor:
    """Embeds guidance scales (B,) as (B, 256), as the pipelines' `get_guidance_scale_embedding` does."""
    half = WIDTH // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * -(math.log(10_000) / (half - 1)))
    angles = 1000 * (scale - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
