"""Marks: what a single file says that it predicts, read from its header, and what prunet's own files say.

A single file has no scheduler. What its U-Net predicts, and for which noise, is in marks that trainers and programs
leave beside the weights, and in the config that is given with it: where the two disagree, one of them is wrong, and
every step of a distillation would be as well.

Who reads which mark, besides prunet:

- the tensors `v_pred` and `ztsnr` (both empty): ComfyUI (of SDXL; `ztsnr` only beside `v_pred`), Forge, reForge;
- `edm_mean` with `edm_std`, `edm_vpred.sigma_max`, for EDM's noise: ComfyUI; stable-diffusion.cpp the second, diffusers
  the first;
- `modelspec.*` in the metadata (https://github.com/Stability-AI/ModelSpec): written by sd-scripts (kohya) and ComfyUI,
  the latter with a `predict_key` of its own; `ss_*` by sd-scripts and what is made of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunet.errors import UserError

#: What a mark tells: two fields of a scheduler's config, and whether the noise is EDM's.
PREDICTION, ZERO_SNR, NOISE = "prediction_type", "rescale_betas_zero_snr", "noise"
EPSILON, V = "epsilon", "v_prediction"
TENSORS = {
    "v_pred": (PREDICTION, V),
    "ztsnr": (ZERO_SNR, True),
    **dict.fromkeys(("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"), (NOISE, "EDM")),
}
PREDICTIONS = {"eps": EPSILON, "v": V, "vpred": V, "v_pred": V, "v-prediction": V}  # and diffusers' own words
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
ARCHITECTURES = {"stable-diffusion-v2-768-v": V, "stable-diffusion-v2-512": EPSILON}
VERSIONS = {"sd_v1": EPSILON, "sd_v2": EPSILON, "sd_v1_v": V, "sd_v2_v": V}
MODELSPEC = {  # layout -> architecture, by what it predicts
    "sd-v1": {EPSILON: "stable-diffusion-v1", V: "stable-diffusion-v1"},
    "sd-v2": {EPSILON: "stable-diffusion-v2-512", V: "stable-diffusion-v2-768-v"},
    "sdxl": {EPSILON: "stable-diffusion-xl-v1-base", V: "stable-diffusion-xl-v1-base"},
}
LABELS = {"sd-v1": "SD v1", "sd-v2": "SD v2", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Mark:
    """One statement: `field` is `value`, says the tensor or metadata `where`."""

    field: str
    value: Any
    where: str


def read_marks(path: str | Path) -> list[Mark]:
    """All that a `.safetensors` file says of its prediction and noise, from its header alone.

    Raises:
        UserError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be opened ({error}): pass a .safetensors file") from error
    marks = [Mark(*TENSORS[name], f"its tensor {name}") for name in TENSORS if name in names]
    for key, values in (
        ("modelspec.prediction_type", None),
        ("modelspec.predict_key", None),
        ("modelspec.architecture", ARCHITECTURES),
        ("ss_base_model_version", VERSIONS),
        ("ss_v_parameterization", {"true": V, "1": V, "false": EPSILON, "0": EPSILON}),
        ("ss_zero_terminal_snr", BOOLEANS),
    ):
        word = str(metadata.get(key, "")).strip().lower()
        value = values.get(word) if values is not None else PREDICTIONS.get(word, word[:40])
        if word not in ("", "none") and value is not None:
            field = ZERO_SNR if values is BOOLEANS else PREDICTION
            marks.append(Mark(field, value, f"{key} in its metadata"))
    return marks


def check_marks(path: str | Path, scheduler: Mapping[str, Any], whose: str, layout: str) -> list[Mark]:
    """Compares a file's marks with the scheduler's config that it would be used with, which `whose` names.

    Returns the marks. `layout` (`sd-v1`, `sd-v2`, `sdxl`) is for the advice.

    Raises:
        UserError: they disagree, or the marks with each other; or the noise is not that of Stable Diffusion.
    """
    marks = read_marks(path)
    said: dict[str, Mark] = {}
    for mark in marks:
        first = said.setdefault(mark.field, mark)
        if first.value != mark.value:
            raise UserError(
                f"{path} says two things of its {mark.field}: {first.value} ({first.where}) and {mark.value} "
                f"({mark.where}); save it as a diffusers folder, whose scheduler alone says it, and give that"
            )
    ours = {PREDICTION: scheduler.get(PREDICTION, EPSILON), ZERO_SNR: bool(scheduler.get(ZERO_SNR, False))}
    for field, mark in said.items():
        if field == NOISE:
            made_for = scheduler.get("_class_name", LABELS[layout])
            raise UserError(
                f"{path}: trained for EDM's noise by {mark.where}, for {made_for} by {whose}; prunet knows the noise "
                "of SD v1, v2 and SDXL alone: give a model that was trained with it"
            )
        if mark.value != ours[field]:
            raise UserError(
                f"{path}: {field} is {mark.value} by {mark.where}, and {ours[field]} by {whose}; "
                f"{_advice(field, mark.value, layout)}"
            )
    return marks


def _advice(field: str, value: Any, layout: str) -> str:
    known = {EPSILON: "stabilityai/stable-diffusion-2-1-base", V: "stabilityai/stable-diffusion-2-1"}
    such_as = f", such as {known[value]}" if layout == "sd-v2" and field == PREDICTION and value in known else ""
    return (
        f"give with --config (in a recipe teacher.config) the folder or hub id of an {LABELS[layout]} whose "
        f"scheduler/scheduler_config.json says {field}: {json.dumps(value)}{such_as}"
    )


def mark(scheduler: Mapping[str, Any], layout: str, title: str, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that say what a file of this scheduler predicts.

    Args:
        scheduler: its config.
        layout: `sd-v1`, `sd-v2` or `sdxl`.
        title: the model's name.
        size: side of its pictures, in pixels.
    """
    prediction = scheduler.get(PREDICTION, EPSILON)
    said = {PREDICTION: prediction, ZERO_SNR: bool(scheduler.get(ZERO_SNR, False))}
    tensors = {name: torch.empty(0) for name in ("v_pred", "ztsnr") if said[TENSORS[name][0]] == TENSORS[name][1]}
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": MODELSPEC[layout][prediction],
        "modelspec.implementation": "sgm",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if prediction == V else prediction,
    }
    return tensors, metadata


def save_marked(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """A safetensors file whose metadata is in order: the library writes it in another one each time."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)
