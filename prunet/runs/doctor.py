"""What this machine has for prunet: versions, device, memory and disk, the hub, optional packages."""

import os
import platform
import shutil
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants

from prunet import __version__
from prunet.extras import EXTRAS, missing
from prunet.runtime import Runtime
from prunet.training.gpu import has_fp8

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "huggingface-hub", "safetensors", "pydantic")
HUB_S = 3.0  # seconds to wait for the hub


def examine() -> dict[str, Any]:
    """Returns facts about this machine, all plain JSON types; nothing is downloaded, and no failure raises."""
    runtime = Runtime()
    device = runtime.torch_device
    cache = Path(constants.HF_HUB_CACHE)
    above = next(path for path in (cache, *cache.parents) if path.exists())
    return {
        "versions": {"prunet": __version__, "python": platform.python_version(), **_versions()},
        "system": platform.platform(),
        "device": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "kind": device.type,
            "count": torch.cuda.device_count() if device.type == "cuda" else 1,
            "precision": runtime.mixed_precision,
            "fp8": has_fp8(device),
            "threads": torch.get_num_threads(),
        },
        "memory": {"total": psutil.virtual_memory().total, "free": psutil.virtual_memory().available, **_cuda(device)},
        "disk": {"current folder": shutil.disk_usage(".").free, f"hub's cache {cache}": shutil.disk_usage(above).free},
        "hub": {"endpoint": constants.ENDPOINT, "state": reach(constants.ENDPOINT)},
        "extras": {extra: {"missing": missing(extra), "for": purpose} for extra, (_, purpose) in EXTRAS.items()},
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cuda(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"device total": total, "device free": free}


def reach(endpoint: str) -> str:
    """Returns whether the hub answers within `HUB_S` seconds; files in its cache work without it."""
    if constants.HF_HUB_OFFLINE:
        return "offline, as HF_HUB_OFFLINE asks: only what is in its cache can be used"
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_S):
            return "reachable"
    except urllib.error.HTTPError as error:
        return f"reachable (it answers {error.code})"
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        return f"not reachable ({why}): only local models and what is in its cache can be used"
