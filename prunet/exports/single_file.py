"""A pipeline as one `.safetensors` file in the original LDM layout."""

import shutil
from pathlib import Path

import torch

from prunet.disk.files import new_file, new_folder
from prunet.disk.seals import CHANGED, SEAL, file_checksum, known_checksum, read_seal, verify
from prunet.errors import UserError
from prunet.teacher import ldm, marks
from prunet.teacher.teacher import Teacher


def export_single_file(pipeline: Path | str, path: Path | str, *, fp16: bool = False) -> Path:
    """Writes a pipeline folder as one `.safetensors` in the original LDM layout, with its configs in `NAME.config/`.

    The seal of the configs holds the checksum of the file.

    Raises:
        UserError: not a pipeline folder, or damaged; or `path` does not end in `.safetensors`.
        RuntimeError: the U-Net does not load to the same bits; the file is deleted.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: name the single file something.safetensors")
    verify(Path(pipeline), f"delete {pipeline} and export it again")
    source = Teacher(pipeline, dtype=torch.float16 if fp16 else torch.float32)
    encoders = {name: source.text_part(name) for name in source.text_encoders}
    tensors = ldm.to_ldm(source.unet, source.vae, **encoders, dtype=source.dtype)
    config = source.noise_scheduler.config
    marked, metadata = marks.mark(config, source.layout, path.stem, source.native_size)
    with new_file(path) as file:
        marks.save_marked({**tensors, **marked}, metadata, file)
        written = file_checksum(file)
        path.unlink(missing_ok=True)  # a kill must not leave the old file beside the new configs
        with new_folder(path.with_suffix(".config"), "configs", written) as part:
            ignored = shutil.ignore_patterns("*.safetensors", "README.md", SEAL)
            shutil.copytree(pipeline, part, ignore=ignored, dirs_exist_ok=True)
    again = ldm.from_ldm_unet(path, source.unet_config).state_dict()
    if any(not torch.equal(again[k], v) for k, v in source.unet.state_dict().items()):
        path.unlink()
        raise RuntimeError(f"{path}: the U-Net did not load to the same weights")
    return path


def is_exported(path: Path) -> bool:
    """Returns whether a single file is as `export_single_file` wrote it, by the seal of its configs."""
    seal = read_seal(path.with_suffix(".config"))
    return seal is not None and seal.get("made_from") == known_checksum(path)


def check_single_file(path: Path, fix: str) -> None:
    """Refuses a single file that was changed; `fix` says what to do. Files of older versions are not checked.

    Raises:
        UserError: it has other bytes than were written.
    """
    if "made_from" in (read_seal(path.with_suffix(".config")) or {}) and not is_exported(path):
        raise UserError(f"{path}: {CHANGED}: {fix}")
