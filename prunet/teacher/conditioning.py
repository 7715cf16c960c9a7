"""What tells the denoiser what to draw."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompt embeddings (B, 77, D) and, for SDXL, the pooled ones (B, P)."""

    embeds: Tensor
    pooled: Tensor | None = None


def conditioning(embeds: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of the denoiser that say what to draw.

    Shapes: `embeds` (B, 77, D); for SDXL `pooled` (B, P) and `time_ids` (B, 6): original height and width, crop top
    and left, target height and width, in pixels.
    """
    if pooled is None:
        return {"encoder_hidden_states": embeds}
    return {
        "encoder_hidden_states": embeds,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
    }
