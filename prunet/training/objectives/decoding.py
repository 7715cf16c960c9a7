"""Distillation of the VAE's decoder: a small decoder learns the pictures that the teacher's VAE makes from latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from prunet.denoisers.taps import Features, tap
from prunet.teacher.teacher import Teacher
from prunet.training.losses import feature_losses, mse
from prunet.training.objectives.objective import Objective
from prunet.training.session import Session

#: The weight of the features; the weight of the pixels is 1.
FEATURES = 0.1
#: Blocks at each resolution, and at the last one, as in TAESD (github.com/madebyollin/taesd).
BLOCKS, LAST = 3, 1


def small_decoder(teacher: Teacher, seed: int = 0) -> AutoencoderTiny:
    """Makes a decoder for the teacher's latents with random weights, as a stock `AutoencoderTiny`.

    It has TAESD's form, and half the width of the VAE at full resolution, but at least 16 channels (fewer are not
    faster). The encoder is as small as possible, and all zeros.
    """
    channels: Sequence[int] = teacher.part_config("vae")["block_out_channels"]
    width, levels = max(16, channels[0] // 2), len(channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoencoderTiny(
            latent_channels=teacher.part_config("vae").get("latent_channels", 4),
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(width,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(BLOCKS,) * (levels - 1) + (LAST,),
        )
    for parameter in net.encoder.requires_grad_(False).parameters():
        parameter.data.zero_()
    return net


class Decoding(Objective):
    """The squared error of the pixels, and the relative squared error of features of both pictures (`feature/MODULE`).

    The features are outputs of the first blocks of the VAE's encoder.
    """

    def __init__(self, teacher: Teacher, student: AutoencoderTiny) -> None:
        self._vae, self._scaling_factor, self._student = teacher.vae, teacher.scaling_factor, student
        self._looks = ["encoder.conv_in", "encoder.down_blocks.0"]
        self.names = ("pixel", *(f"feature/{name}" for name in self._looks))

    def start(self, session: Session) -> None:
        """Puts the VAE on the session's device."""
        self._vae = self._vae.to(session.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Collects the features of both pictures."""
        with tap([self._vae.get_submodule(name) for name in self._looks]) as features:
            self._features: Features = features
            yield

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the terms, and the terms (`Objective`)."""
        with torch.no_grad():
            theirs = decoded(self._vae, batch["latents"], self._scaling_factor)
            self._look(theirs)
            expected = self._features.take()
        ours = self._student.decode(batch["latents"], return_dict=False)[0]
        self._look(ours)
        terms = torch.stack([mse(ours, theirs), *feature_losses(self._features.take(), expected, normalize=True)])
        return terms[0] + FEATURES * terms[1:].sum(), terms

    def _look(self, pixels: Tensor) -> None:
        """Runs the first blocks of the VAE's encoder on a picture."""
        encoder = self._vae.encoder
        encoder.down_blocks[0](encoder.conv_in(pixels))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the loss, and the two kinds of terms."""
        feature = sum(means[name] for name in self.names[1:])
        return {"loss": means["pixel"] + FEATURES * feature, "pixel": means["pixel"], "feature": feature}


def decoded(vae: Any, latents: Tensor, scaling_factor: float) -> Tensor:
    """Returns the pixels (B, 3, H, W), -1 to 1, of scaled latents (B, C, h, w)."""
    pixels: Tensor = vae.decode(latents.to(vae.dtype) / scaling_factor, return_dict=False)[0]
    return pixels.float().clamp(-1, 1)
