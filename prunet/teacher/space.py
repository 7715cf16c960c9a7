"""Sizes that a teacher can draw, and whether two teachers share latents and noise."""

import json
from typing import Any

from prunet.errors import UserError
from prunet.teacher.teacher import Teacher


def check_size(teacher: Teacher, size: int, name: str = "data.size") -> None:
    """Refuses a picture size (of the option `name`) that the U-Net's levels cannot halve."""
    step = side_step(teacher)
    if size % step:
        raise UserError(f"{name}: {size} is not a multiple of {step}, which this model's levels need")


def side_step(teacher: Teacher) -> int:
    """Pixels of which a side must be a multiple, so that the U-Net's levels can halve it."""
    return teacher.vae_scale * teacher.architecture.side_step(teacher.unet_config)


def check_same_space(first: Teacher, other: Teacher) -> None:
    """Refuses a second teacher of another layout, another latent space or another thing to predict."""
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
    """The U-Net's config, with the defaults where a version wrote none, and lists for tuples."""
    config = json.loads(json.dumps(dict(teacher.architecture.skeleton(teacher.unet_config).config)))
    return {key: value for key, value in config.items() if not key.startswith("_")}


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
        "rescale_betas_zero_snr",
    )
    return {name: config.get(name) for name in names}
