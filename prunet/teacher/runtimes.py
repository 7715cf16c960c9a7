"""Folders that were written for runtimes other than torch, as prunet tells them."""

from pathlib import Path

#: Runtime -> what only a folder for it holds, and what draws with it.
RUNTIMES = {
    "OpenVINO": ("unet/openvino_model.xml", "`prunet generate`"),
    "ONNX Runtime": ("unet/model.onnx", "`prunet generate`"),
    "Core ML": ("Unet.mlpackage", "a Mac"),
}


def runtime_of(folder: Path | str) -> str | None:
    """Returns the runtime (a key of `RUNTIMES`) that a folder was written for; None for a folder of torch."""
    return next((name for name, (held, _) in RUNTIMES.items() if (Path(folder) / held).exists()), None)
