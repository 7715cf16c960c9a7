"""Finds the weights of a part in a pipeline's folder: one safetensors file, several with an index, or a variant."""

import re
from pathlib import Path

from prunet.errors import UserError
from prunet.teacher.configs import read_object
from prunet.words import command

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def find_weights(folder: Path, stem: str, source: str, part: str) -> list[Path]:
    """Returns the weight files that stock diffusers would load, or else those of the only variant, or of fp16.

    `source` and `part` begin messages.

    Raises:
        UserError: there are no weights, several variants, or a pickle that stock diffusers would load instead.
    """
    file, index = weight_names(folder, stem)
    target = folder / f"{stem}.safetensors"
    if file != target:
        _check_pickles(folder, stem, file, target)
    # If both exist, transformers reads the single file, diffusers the files of the index.
    if index.is_file() and not (part.startswith("text_encoder") and file.is_file()):
        names = read_object(index, f"{source}: {part}").get("weight_map")
        names = set(names.values()) if isinstance(names, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{index}: its weight_map names no files beside it: fetch or copy it again")
        return [folder / name for name in sorted(names)]
    if file.is_file():
        return [file]
    pickles = sorted(folder.glob("*.bin"))
    advice = "; its .bin files are pickles: save the pipeline with safe_serialization" if pickles else ""
    if len(pickles) == 1:
        advice = f"; {pickles[0].name} is a pickle: {command('convert', pickles[0], '-o', target)}"
    raise UserError(f"{source}: no {part}/{target.name}{advice}")


def _check_pickles(folder: Path, stem: str, variant: Path, target: Path) -> None:
    """Refuses pickles beside a variant's safetensors, because stock diffusers would load them, and they may differ."""
    names = re.compile(rf"({stem}|pytorch_model)(-\d+-of-\d+)?\.bin")
    if found := next((path for path in sorted(folder.glob("*.bin")) if names.fullmatch(path.name)), None):
        fix = command("convert", found, "-o", target) if "-of-" not in found.name else "save it as safetensors"
        raise UserError(
            f"{found} is a pickle, which stock diffusers would load; prunet loads no pickles, and {variant.name} may "
            f"hold other weights: {fix}, or delete the pickle to use the variant"
        )


def weight_names(folder: Path, stem: str) -> tuple[Path, Path]:
    """Returns two paths: the weights as one file, and the index if they are several files. Stock readers look for both.

    The names are those without a variant (`fp16`, `non_ema`) if such a file exists, else those of the only variant, or
    of fp16.

    Raises:
        UserError: there are several variants to choose from.
    """
    found = {variant_of(file.name, stem) for file in folder.glob(f"{stem}.*")} if folder.is_dir() else set()
    variants = sorted(variant for variant in found if variant)
    if None in found or not variants:
        return folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if len(variants) > 1 and "fp16" not in variants:
        raise UserError(
            f"{folder}: weights in the variants {', '.join(variants)}, and none without; copy the one that you want to "
            f"{stem}.safetensors"
        )
    variant = "fp16" if "fp16" in variants else variants[0]
    return folder / f"{stem}.{variant}.safetensors", folder / f"{stem}.safetensors.index.{variant}.json"


def variant_of(name: str, stem: str) -> str | None:
    """Returns the variant in a file's name: None if it has none, "" if the file does not belong to the weights.

    `fp16` in `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`.
    """
    if not (
        found := re.fullmatch(rf"{stem}(?:\.(\w+))?(-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", name)
    ):
        return ""
    return found[1] or found[3]
