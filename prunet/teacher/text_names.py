"""A text encoder's tensors under the names that every program reads, which begin with `text_model.`.

transformers 5 writes a `CLIPTextModel` without this prefix, and reads both forms. transformers 4 knows only the names
with the prefix, and fills tensors that it does not find with random numbers. ComfyUI and scripts that convert folders
also need the prefix.
"""

import json
import shutil
from pathlib import Path
from typing import Any

PREFIX = "text_model."
BARE = ("embeddings.", "encoder.", "final_layer_norm.")


def classical(name: str) -> str:
    """Adds the prefix: `encoder.layers.0...` becomes `text_model.encoder.layers.0...`; other names stay."""
    return PREFIX + name if name.startswith(BARE) else name


def save_text_encoder(model: Any, folder: Path) -> None:
    """Writes a stock folder of a CLIP text encoder."""
    state = {classical(name): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)


def copy(source: Path, target: Path) -> None:
    """Copies a file of a text encoder's weights, or their index; byte for byte if the names have the prefix."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from prunet.teacher.marks import save_marked

    if source.suffix == ".json":
        index = json.loads(source.read_text(encoding="utf-8"))
        index["weight_map"] = {classical(name): file for name, file in index["weight_map"].items()}
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return
    with safe_open(source, framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    if all(name == classical(name) for name in names):
        shutil.copyfile(source, target)
    else:
        tensors = {classical(name): tensor for name, tensor in load_file(source).items()}
        save_marked(tensors, {"format": "pt", **(metadata or {})}, target)
