"""A student on disk: a stock diffusers folder of one denoiser."""

import json
from pathlib import Path

from prunet.denoisers.architecture import Net
from prunet.denoisers.freeze import freeze
from prunet.denoisers.known import architecture_of
from prunet.disk.files import new_folder, read_json
from prunet.disk.seals import verify
from prunet.errors import UserError, is_out_of_memory


def save_unet(net: Net, folder: Path, what: str, made_from: str | None = None) -> None:
    """Writes a denoiser as a stock diffusers folder, whole or not at all; `what` is the kind of the folder's seal."""
    with new_folder(folder, what, made_from) as part:
        write_unet(net, part)


def load_unet(folder: Path, made_from: str | None = None) -> Net:
    """Loads a denoiser that `save_unet` wrote, in fp32.

    Raises:
        UserError: the folder is missing, damaged, or was made from other inputs than `made_from`.
    """
    fix = f"delete {folder} and run again"
    verify(folder, fix, made_from)
    config = read_json(folder / "config.json", fix)
    try:
        return freeze(architecture_of(config).load(folder))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: not a whole denoiser ({error}): {fix}") from error


def write_unet(net: Net, folder: Path) -> None:
    """Writes a denoiser as a stock diffusers folder, with all weights in one file."""
    net.save_pretrained(folder, safe_serialization=True, max_shard_size="1TB")
    # diffusers writes the path that the model was opened from, which means nothing on other machines.
    config = folder / "config.json"
    value = json.loads(config.read_text(encoding="utf-8"))
    value.pop("_name_or_path", None)
    config.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
