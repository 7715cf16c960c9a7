"""Optional packages, which extras of prunet bring."""

import importlib
import importlib.util
from typing import Any

from prunet.errors import UserError

#: Extra of the package -> the modules that it brings, and what they are for.
EXTRAS = {
    "coreml": (("coremltools", "sklearn"), "prunet export --coreml"),
    "data": (("datasets",), "Parquet, saved data sets, data sets of the hub"),
    "eval": (("open_clip", "torch_fidelity"), "FID, IS, KID, CLIP score, LPIPS (prunet measure, prunet evaluate)"),
    "gguf": (("gguf",), "prunet export --gguf"),
    "memory": (("bitsandbytes", "torchao"), "--use-8bit-adam, --teacher-8bit, --teacher-fp8"),
    "onnx": (("onnx", "onnxruntime"), "prunet export --onnx"),
    "openvino": (("nncf", "openvino", "openvino_genai", "openvino_tokenizers"), "prunet export --openvino"),
    "personalize": (("peft",), "training a LoRA on a student"),
    "tensorboard": (("tensorboard",), "--tracker tensorboard"),
    "ui": (("gradio", "peft"), "prunet play"),
}


def missing(extra: str) -> list[str]:
    """Lists the modules of an extra that are not installed; nothing is imported."""
    return [name for name in EXTRAS[extra][0] if importlib.util.find_spec(name) is None]


def check_extra(extra: str, what: str) -> None:
    """Refuses `what` where a module of its extra is not installed.

    Raises:
        UserError: says how to install it.
    """
    for name in missing(extra):
        raise _absent(name, extra, what)


def need(module: str, extra: str, what: str) -> Any:
    """Imports a module of an extra, which `what` needs.

    Raises:
        UserError: not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _absent(module, extra, what) from error


def _absent(module: str, extra: str, what: str) -> UserError:
    return UserError(f"{what} needs {module}, which is not installed: pip install 'prunet[{extra}]'")
