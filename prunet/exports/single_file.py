"""A pipeline as one file in the original LDM layout: `.safetensors`, or GGUF for stable-diffusion.cpp."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from prunet.denoisers.known import architecture_of
from prunet.disk.files import new_file, new_folder
from prunet.disk.seals import CHANGED, SEAL, file_checksum, known_checksum, read_seal, verify
from prunet.errors import UserError
from prunet.exports.gguf import Bits, write_gguf
from prunet.teacher import ldm, marks
from prunet.teacher.teacher import Teacher

#: Programs that number a U-Net's layers differently; `comfyui` also means diffusers and others.
Program = Literal["comfyui", "sd.cpp"]


def export_single_file(
    pipeline: Path | str,
    path: Path | str,
    *,
    fp16: bool = False,
    program: Program = "comfyui",
    bits: Bits | None = None,
) -> Path:
    """Writes a pipeline folder as one `.safetensors` in the original LDM layout, with its configs in `NAME.config/`.

    With `bits` it is a `.gguf` instead, which only stable-diffusion.cpp opens. The seal of the configs has the checksum
    of the file.

    Raises:
        UserError: the folder is not a pipeline or is damaged; `path` does not end in `.safetensors` (`.gguf`); or the
            program does not know such a U-Net.
        RuntimeError: the U-Net does not load to the same bits; the file is deleted.
    """
    path = Path(path)
    check_name(path, bits)
    verify(Path(pipeline), f"delete {pipeline} and export it again")
    half = fp16 and not bits  # rounding only once is best for 8 and 4 bits
    source = Teacher(pipeline, dtype=torch.float16 if half else torch.float32)
    gaps = bits is not None or program == "sd.cpp"
    if gaps:
        check_for_cpp(source.unet_config)
    encoders = {name: source.text_part(name) for name in source.text_encoders}
    tensors = ldm.to_ldm(source.unet, source.vae, **encoders, dtype=source.dtype, gaps=gaps)
    config = source.noise_scheduler.config
    marked, metadata = marks.mark(config, source.layout, path.stem, source.native_size)
    with new_file(path) as file:
        if bits:
            write_gguf({**tensors, **marked}, file, bits)
        else:
            marks.save_marked({**tensors, **marked}, metadata, file)
        written = file_checksum(file)
        path.unlink(missing_ok=True)  # otherwise a killed process could leave the old file beside the new configs
        with new_folder(path.with_suffix(".config"), "configs", written) as part:
            ignored = shutil.ignore_patterns("*.safetensors", "README.md", SEAL)
            shutil.copytree(pipeline, part, ignore=ignored, dirs_exist_ok=True)
    if not bits:
        _check_unet(path, source)
    return path


def check_name(path: Path, bits: str | None) -> None:
    """Refuses a file's name that does not say its format."""
    if path.suffix != (suffix := ".gguf" if bits else ".safetensors"):
        raise UserError(f"{path}: not a name for the single file: give NAME{suffix}")


def check_for_cpp(config: Mapping[str, Any]) -> None:
    """Refuses a denoiser that stable-diffusion.cpp does not know.

    Raises:
        UserError: the reason, and what to use instead.
    """
    answers = architecture_of(config).loads_in(config)
    said, _, why = answers.get("stable-diffusion.cpp, single file", "no: it has no single file").partition(": ")
    if said == "no":
        instead = "export without --for and --gguf, or for a CPU with --openvino"
        raise UserError(f"stable-diffusion.cpp does not load this student: {why}; {instead}")


def _check_unet(path: Path, source: Teacher) -> None:
    again = ldm.from_ldm_unet(path, source.unet_config).state_dict()
    if any(not torch.equal(again[k], v) for k, v in source.unet.state_dict().items()):
        path.unlink()
        raise RuntimeError(f"{path}: the U-Net did not load to the same weights")


def is_exported(path: Path) -> bool:
    """Returns whether a single file is unchanged since `export_single_file` wrote it, by the seal of its configs."""
    seal = read_seal(path.with_suffix(".config"))
    return seal is not None and seal.get("made_from") == known_checksum(path)


def check_single_file(path: Path, fix: str) -> None:
    """Refuses a single file that was changed; `fix` says what to do. Files of older versions are not checked.

    Raises:
        UserError: the file was changed.
    """
    if "made_from" in (read_seal(path.with_suffix(".config")) or {}) and not is_exported(path):
        raise UserError(f"{path}: {CHANGED}: {fix}")
