"""torchvision with a torch that it was not built for."""

import importlib
import importlib.util
from typing import Any

_ops: Any = None  # torch forgets the operators when this object is deleted


def declare_torchvision_ops() -> None:
    """Declares torchvision's compiled operators if they do not load, so that torchvision can be imported.

    These operators do not load with a CPU wheel of torch, and then torchvision's import fails. prunet uses only
    torchvision's transforms, so a declaration is enough. Call this before diffusers or transformers, which import
    torchvision.
    """
    global _ops
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        _ops = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
