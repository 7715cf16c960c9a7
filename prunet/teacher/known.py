"""The layouts that need no file: `sd-v1`, `sd-v2`, `sdxl`."""

import json
from importlib import resources
from typing import Any

LAYOUTS = ("sd-v1", "sd-v2", "sdxl")
# The configs and tokenizers of a bare single file come from the hub, from the repositories that diffusers names too.
HUB_CONFIGS = {
    "sd-v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-v2": "stabilityai/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def layout_config(name: str) -> dict[str, Any]:
    """The U-Net config of a known layout: `sd-v1`, `sd-v2` (v2.1-base) or `sdxl`."""
    path = resources.files("prunet.teacher") / "layouts" / f"{name}.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
