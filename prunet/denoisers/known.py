"""The denoisers that prunet knows."""

from collections.abc import Mapping
from typing import Any

from prunet.denoisers.architecture import Architecture
from prunet.denoisers.unet2d.architecture import UNET2D
from prunet.errors import UserError

ARCHITECTURES: tuple[Architecture, ...] = (UNET2D,)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """That of a denoiser's config, by the name of its class; without one (old configs) a U-Net.

    Raises:
        UserError: a class that prunet cannot compress.
    """
    name = config.get("_class_name", UNET2D.class_name)
    for architecture in ARCHITECTURES:
        if architecture.class_name == name:
            return architecture
    known = ", ".join(architecture.class_name for architecture in ARCHITECTURES)
    raise UserError(f"The denoiser is a {name}; prunet removes blocks of {known}")
