"""Known layouts: configs of published denoisers, for use without a file."""

import json
from importlib import resources
from typing import Any

#: Names of layouts, and the repository of each `config.json`, without fields that neither prunet nor diffusers reads.
LAYOUTS = {
    "sd-v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-v2": "stabilityai/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
    "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}


def layout_config(name: str) -> dict[str, Any]:
    """Returns the denoiser's config of a layout in `LAYOUTS`."""
    path = resources.files("prunet.teacher") / "layouts" / f"{name}.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
