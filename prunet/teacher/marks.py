"""Marks: statements in the header of a single file about the model's prediction and noise.

A single file has no scheduler. Trainers and other programs leave marks beside the weights that say what the U-Net
predicts, and for which noise. The config that a user gives with the file says the same. If the two disagree, one of
them is wrong, and then every step of a distillation would be wrong.

Programs that use each mark, besides prunet:

- the tensors `v_pred` and `ztsnr` (both empty): ComfyUI (for SDXL; `ztsnr` only beside `v_pred`), Forge, reForge;
- `edm_mean` with `edm_std`, and `edm_vpred.sigma_max`, for EDM's noise: ComfyUI reads both, diffusers the first,
  stable-diffusion.cpp the second;
- `modelspec.*` in the metadata (https://github.com/Stability-AI/ModelSpec): written by sd-scripts (kohya), and by
  ComfyUI, which adds `predict_key`; `ss_*`: written by sd-scripts and programs based on it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunet.errors import UserError
from prunet.teacher.placing import open_file

#: The fields of a mark: two of a scheduler's config, and whether the noise is EDM's.
PREDICTION, ZERO_SNR, NOISE = "prediction_type", "rescale_betas_zero_snr", "noise"
EPSILON, V = "epsilon", "v_prediction"
TENSORS = {
    "v_pred": (PREDICTION, V),
    "ztsnr": (ZERO_SNR, True),
    **dict.fromkeys(("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"), (NOISE, "EDM")),
}
PREDICTIONS = {"eps": EPSILON, "v": V, "vpred": V, "v_pred": V, "v-prediction": V}  # names of other programs
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
ARCHITECTURES = {"stable-diffusion-v2-768-v": V, "stable-diffusion-v2-512": EPSILON}
VERSIONS = {"sd_v1": EPSILON, "sd_v2": EPSILON, "sd_v1_v": V, "sd_v2_v": V}
MODELSPEC = {  # architecture by layout and prediction type
    "sd-v1": {EPSILON: "stable-diffusion-v1", V: "stable-diffusion-v1"},
    "sd-v2": {EPSILON: "stable-diffusion-v2-512", V: "stable-diffusion-v2-768-v"},
    "sdxl": {EPSILON: "stable-diffusion-xl-v1-base", V: "stable-diffusion-xl-v1-base"},
}
LABELS = {"sd-v1": "SD v1", "sd-v2": "SD v2", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Mark:
    """One statement of a file: `field` is `value`, according to the tensor or metadata `where`."""

    field: str
    value: Any
    where: str


def read_marks(path: str | Path) -> list[Mark]:
    """Reads all marks of a `.safetensors` file, from its header.

    Raises:
        UserError: the file is not safetensors, or this user may not read it.
    """
    with open_file(path) as file:
        names, metadata = set(file.keys()), file.metadata() or {}
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


def check_marks(path: str | Path, scheduler: Mapping[str, Any], owner: str, layout: str) -> list[Mark]:
    """Compares a file's marks with a scheduler's config, and returns the marks.

    Args:
        path: the `.safetensors` file.
        scheduler: the config to use with the file.
        owner: the config's name in messages.
        layout: `sd-v1`, `sd-v2` or `sdxl`, for the advice.

    Raises:
        UserError: marks and config disagree, or two marks do; or the noise is not that of Stable Diffusion.
    """
    marks = read_marks(path)
    said: dict[str, Mark] = {}
    for mark in marks:
        first = said.setdefault(mark.field, mark)
        if first.value != mark.value:
            raise UserError(
                f"{path} says two things about its {mark.field}: {first.value} ({first.where}) and {mark.value} "
                f"({mark.where}); save it as a diffusers folder, where only the scheduler says it, and give that"
            )
    ours = {PREDICTION: scheduler.get(PREDICTION, EPSILON), ZERO_SNR: bool(scheduler.get(ZERO_SNR, False))}
    for field, mark in said.items():
        if field == NOISE:
            made_for = scheduler.get("_class_name", LABELS[layout])
            raise UserError(
                f"{path}: trained for EDM's noise by {mark.where}, for {made_for} by {owner}; prunet supports only the "
                "noise of SD v1, v2 and SDXL: give a model that was trained with it"
            )
        if mark.value != ours[field]:
            raise UserError(
                f"{path}: {field} is {mark.value} by {mark.where}, and {ours[field]} by {owner}; "
                f"{_advice(field, mark.value, layout)}"
            )
    return marks


def _advice(field: str, value: Any, layout: str) -> str:
    known = {EPSILON: "stabilityai/stable-diffusion-2-1-base", V: "stabilityai/stable-diffusion-2-1"}
    such_as = f", such as {known[value]}" if layout == "sd-v2" and field == PREDICTION and value in known else ""
    return (
        f"give with --config (in a recipe teacher.config) the folder or hub id of an {LABELS[layout]} with "
        f"a scheduler/scheduler_config.json that says {field}: {json.dumps(value)}{such_as}"
    )


def mark(scheduler: Mapping[str, Any], layout: str, title: str, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata that mark a file of a model.

    Args:
        scheduler: the config of the model's scheduler.
        layout: `sd-v1`, `sd-v2` or `sdxl`.
        title: the model's name.
        size: side of the model's pictures, in pixels.
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
    """Writes a safetensors file with sorted metadata, so equal contents give equal bytes; the library varies them."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)
