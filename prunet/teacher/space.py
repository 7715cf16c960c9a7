"""Sizes that a teacher can draw, and whether two teachers have the same latents and noise."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from prunet.denoisers.architecture import Architecture
from prunet.errors import UserError
from prunet.teacher.teacher import Teacher


class Sized(Protocol):
    """A model with a denoiser and a decoder: a teacher, or a folder of another runtime."""

    @property
    def unet_config(self) -> Mapping[str, Any]:
        """The denoiser's config."""

    @property
    def architecture(self) -> Architecture:
        """The architecture of the denoiser."""

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along one side."""


def check_size(teacher: Sized, size: int, name: str = "data.size") -> None:
    """Refuses a picture size (the value of `name`) that the levels of the U-Net cannot halve.

    Raises:
        UserError: the size does not fit; the message has the number that it must be a multiple of.
    """
    step = side_step(teacher)
    if size % step:
        raise UserError(f"{name}: {size} is not a multiple of {step}, which the levels of this U-Net need")


def side_step(teacher: Sized) -> int:
    """Returns the number of pixels that sides must be multiples of, so that each level of the U-Net can halve them."""
    return teacher.vae_scale * teacher.architecture.side_step(teacher.unet_config)


def check_same_space(first: Teacher, other: Teacher) -> None:
    """Refuses a second teacher with another denoiser, latent space, noise schedule or prediction type.

    Raises:
        UserError: the teachers differ; the message has the first difference.
    """
    sides: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("U-Net", _denoiser(first), _denoiser(other)),
        ("latent space", _latent_space(first), _latent_space(other)),
        ("noise schedule", _process(first), _process(other)),
    ]
    for what, ours, theirs in sides:
        wrong = sorted(key for key in {*ours, *theirs} - {"sample_size"} if ours.get(key) != theirs.get(key))
        if wrong:
            raise UserError(
                f"{other.source}: its {what} is not that of {first.source} ({wrong[0]}: {theirs.get(wrong[0])}, not "
                f"{ours.get(wrong[0])}); teachers in turn need the same layout and the same latents"
            )


def _denoiser(teacher: Teacher) -> dict[str, Any]:
    """Returns the U-Net's config as plain data, with defaults for fields that older versions did not write.

    Some files have null where others have false (`upcast_attention`), which means the same.
    """
    config = json.loads(json.dumps(dict(teacher.architecture.skeleton(teacher.unet_config).config)))
    return {key: value for key, value in config.items() if not key.startswith("_") and value is not False}


def _latent_space(teacher: Teacher) -> dict[str, Any]:
    config = teacher.part_config("vae")
    space = {key: config.get(key) for key in ("latent_channels", "block_out_channels")}
    return {**space, "scaling_factor": teacher.scaling_factor}


def _process(teacher: Teacher) -> dict[str, Any]:
    config = teacher.noise_scheduler.config
    names = (
        "prediction_type",
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    return {name: config.get(name) for name in names}
