"""The files of a CLIP tokenizer: its vocabulary, and what they say beyond it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet.errors import UserError
from prunet.teacher.configs import read_object

#: Width from which CLIP text encoders are OpenCLIP's (SD v2, SDXL's second), whose texts are filled up with `!`.
OPEN_CLIP = 1024
END = "<|endoftext|>"
#: The files that say it; the later one counts.
SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")


def vocabulary_files(folder: Path) -> list[Path]:
    """Returns the vocabulary files of the tokenizer in `folder`; without them all texts give the same tokens.

    Raises:
        UserError: a file is missing or empty.
    """
    whole = [folder / "tokenizer.json"], [folder / "vocab.json", folder / "merges.txt"]
    found = [path for files in whole if all(p.is_file() and p.stat().st_size for p in files) for path in files]
    if not found:
        raise UserError(
            f"{folder}: no vocab.json and merges.txt (or tokenizer.json): fetch or copy the tokenizer again"
        )
    return found


def unusual_tokens(folder: Path, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens and the length of the tokenizer in `folder` that differ from its kind's usual ones.

    They change the tokens of a text like another vocabulary does. `encoder`: the text encoder's config.

    Raises:
        UserError: a file is not readable.
    """
    fill = "!" if encoder.get("hidden_size", 0) >= OPEN_CLIP else END
    usual = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": fill}
    usual |= {"model_max_length": encoder.get("max_position_embeddings", 77)}
    said: dict[str, Any] = {}
    for path in (folder / name for name in SPECIAL):
        if path.is_file():
            values = read_object(path, f"{folder}: not a readable tokenizer")
            said |= {key: values[key] for key in usual if values.get(key) is not None}
    said = {key: value.get("content") if isinstance(value, dict) else value for key, value in said.items()}
    return {key: value for key, value in sorted(said.items()) if value != usual[key]}
