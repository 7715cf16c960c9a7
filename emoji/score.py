"""Measures of pictures by emoji-clip: retrieval of the prompt, and KID on its features."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from shards import to_model
from text import tokenize
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from prunet.evaluation.metrics import squared_mmd


@dataclass
class Scorer:
    model: CLIPModel
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        return cls(CLIPModel.from_pretrained(folder).float().eval(), CLIPTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """(N, 3, 128, 128) uint8 -> (N, D), normalized."""
        device = self.model.device
        side = self.model.config.vision_config.image_size
        batches = (resize(batch.to(device), side) for batch in images.split(batch_size))
        parts = [self.model.get_image_features(pixel_values=batch) for batch in batches]
        return F.normalize(torch.cat([_tensor(part) for part in parts]), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """(N, D), normalized."""
        batches = tokenize(self.tokenizer, texts).split(batch_size)
        parts = [self.model.get_text_features(input_ids=batch.to(self.model.device)) for batch in batches]
        return F.normalize(torch.cat([_tensor(part) for part in parts]), dim=-1).cpu()


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> [-1, 1] (B, 3, side, side), as the preprocessor of the folder does it."""
    return F.interpolate(to_model(images), size=side, mode="bicubic", antialias=True).clamp(-1, 1)


def _tensor(output) -> Tensor:
    """transformers 5 returns an output object here, earlier ones the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def retrieval_at_1(images: Tensor, captions: Tensor, target: Tensor | None = None) -> float:
    """Share of the pictures (N, D) whose nearest caption (C, D) is their own, number `target` (N,); by default the
    i-th picture belongs to the i-th caption."""
    target = torch.arange(len(images)) if target is None else target
    return ((images @ captions.T).argmax(dim=1) == target).float().mean().item()


def kid(ours: Tensor, real: Tensor) -> float:
    """KID over all pairs, of the normalized features (N, D) times sqrt(D): the kernel then is (cosine + 1)^3."""
    return squared_mmd(*((features * features.shape[1] ** 0.5).double().numpy() for features in (ours, real)))
