"""The start of image to image and inpainting: the latents of a picture, with as much noise as `strength` says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prunet.console import say
from prunet.errors import UserError
from prunet.teacher.teacher import Teacher

#: The share of the noise schedule that is drawn, without and with a mask.
STRENGTH, STRENGTH_UNDER_MASK = 0.6, 1.0


@dataclass(frozen=True, eq=False)
class StartPicture:
    """A picture to start from (image to image). It is resized, and cropped in the middle.

    `strength`: how much of it changes, above 0, up to 1; by default 0.6, with a mask 1. `mask`: only its white part is
    drawn (inpainting); it has the picture's size.
    """

    picture: Image.Image
    strength: float | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a batch: one picture for all, or one for each.

    `mean`, `std` (1 or B, 4, h, w): scaled latents of the pictures, as a distribution. `strength`: the share of the
    steps that is drawn, above 0, up to 1. `mask`: its white part is drawn (inpainting); it has the size of the
    pictures.
    """

    mean: Tensor
    std: Tensor
    strength: float
    mask: Image.Image | None = None

    def rows(self, at: slice) -> "Start":
        """Returns the start of these pictures."""
        return self if len(self.mean) == 1 else replace(self, mean=self.mean[at], std=self.std[at])

    def inputs(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """Returns arguments for the stock pipeline; the first noise of each generator samples the latents.

        The VAE has encoded the picture before, in its own precision, because the stock pipeline of SDXL would round its
        weights.
        """
        noise = [torch.randn(self.mean.shape[1:], generator=generator) for generator in generators]
        latents = self.mean + self.std * torch.stack(noise).to(self.mean.device)
        given: dict[str, Any] = {"image": latents, "strength": self.strength}
        if self.mask is None:
            return given
        return given | {
            "mask_image": self.mask,
            "masked_image_latents": latents,  # for the U-Nets with 9 channels that prunet does not have
            "width": self.mask.width,
            "height": self.mask.height,
        }


def start_from(
    teacher: Teacher,
    pictures: Sequence[Image.Image],
    *,
    size: int,
    steps: int,
    strength: float | None = None,
    mask: Image.Image | None = None,
) -> Start:
    """Encodes pictures to start from, resized and cropped in the middle to `size` pixels.

    `strength`: 0.6 if not given, 1 with a mask. `steps`: those of the sampler, to check that `strength` leaves some.

    Raises:
        UserError: `strength` is out of range or leaves no step; or `mask` has another size than the picture, or no
            white.
    """
    if strength is None:
        strength = STRENGTH if mask is None else STRENGTH_UNDER_MASK
    _check_strength(strength, steps)
    for picture in pictures:
        _check_mask(mask, picture)
    pixels = torch.stack([_pixels(_fitted(picture.convert("RGB"), size)) for picture in pictures])
    mean, std = teacher.encode_images(pixels)
    return Start(mean, std, strength, None if mask is None else _fitted(mask.convert("L"), size))


def _check_strength(strength: float, steps: int) -> None:
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise UserError(f"strength {strength:g}: give a number above 0, up to 1")
    drawn = int(steps * strength)  # rounded like in the stock pipelines
    if not drawn:
        least = math.ceil(100 / steps) / 100
        raise UserError(f"strength {strength:g}: of {steps} steps that is not one: give {least:g} or more")
    if abs(drawn / steps - strength) >= 0.05:
        say(f"strength {strength:g} of {steps} steps: {drawn} drawn, as with {drawn / steps:.2g}")


def _check_mask(mask: Image.Image | None, picture: Image.Image) -> None:
    if mask is None:
        return
    if mask.size != picture.size:
        sizes = ["{} x {}".format(*image.size) for image in (mask, picture)]
        raise UserError(f"mask: has {sizes[0]} px, its picture {sizes[1]}: give a mask of the picture's size")
    if np.asarray(mask.convert("L")).max() < 128:
        raise UserError("mask: has no white part, and only the white part is drawn: give another mask")


def _fitted(picture: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def _pixels(picture: Image.Image) -> Tensor:
    """Returns pixels (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
