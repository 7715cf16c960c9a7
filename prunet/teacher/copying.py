"""Copies the parts that a student shares with its teacher into the student's pipeline."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from prunet.errors import UserError
from prunet.teacher import text_names
from prunet.teacher.configs import read_object
from prunet.teacher.teacher import Teacher, say_once
from prunet.teacher.weight_files import WEIGHTS, variant_of, weight_names


def save_parts(teacher: Teacher, folder: Path) -> None:
    """Writes the whole pipeline except the U-Net into `folder`; weights are copied byte for byte.

    There are two exceptions. Tensors of text encoders get the names that every program reads
    (`prunet.teacher.text_names`). If the teacher is a single file, the libraries write the VAE and the text encoders,
    in the precision of this teacher.
    """
    configs = teacher.configs()
    index = read_object(configs / "model_index.json", teacher.source)
    for name in [n for n, value in index.items() if isinstance(value, list) and n != "unet"]:
        if index[name][0] is None:
            continue
        if name in WEIGHTS and (teacher.file is not None or teacher.place(name).renamed):
            if name == "vae":
                teacher.vae.save_pretrained(folder / name, safe_serialization=True)
            else:
                text_names.save_text_encoder(teacher.text_part(name), folder / name)
        elif name in WEIGHTS:
            (folder / name).mkdir()
            _copy_config(teacher, configs, name, folder)
            files = teacher.weight_files(name)
            copy = text_names.copy if name.startswith("text_encoder") else shutil.copyfile
            for file in files:
                target = file.name if len(files) > 1 else f"{WEIGHTS[name]}.safetensors"
                copy(file, folder / name / target)
            if len(files) > 1:
                _, index_file = weight_names(configs / name, WEIGHTS[name])
                copy(index_file, folder / name / f"{WEIGHTS[name]}.safetensors.index.json")
        elif not _copy_other(teacher, configs, name, folder):
            index[name] = [None, None]
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index.pop("_name_or_path", None)
    if "safety_checker" in index and index["safety_checker"][0] is None:
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_config(teacher: Teacher, configs: Path, name: str, folder: Path) -> None:
    """Copies a config; that of a text encoder gets `dtype` float32.

    Without this, transformers loads a text encoder that was stored in half precision as it is, while diffusers loads
    the U-Net in full precision. A stock pipeline opened without a dtype would then fail at its first matmul.
    """
    config = read_object(configs / name / "config.json", teacher.source)
    for key in ("dtype", "torch_dtype"):
        if name.startswith("text_encoder") and key in config:
            config[key] = "float32"
    (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_other(teacher: Teacher, configs: Path, name: str, folder: Path) -> bool:
    """Copies a part that prunet does not load itself (tokenizer, scheduler, safety checker); False if it is missing."""
    files = _other_files(teacher, configs, name)
    for target, file in files.items():
        (folder / name).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name / target)
    return bool(files)


def _other_files(teacher: Teacher, configs: Path, name: str) -> dict[str, Path]:
    """Returns the files of a part by their new names, which are without a variant, so that stock classes load them."""
    if teacher.hub is not None:
        teacher.download(f"{name}/*.json", f"{name}/*.txt", f"{name}/model.safetensors")
    files = [p for p in (configs / name).glob("*") if p.suffix in (".json", ".txt", ".safetensors", ".model")]
    if name == "safety_checker" and not any(p.suffix == ".safetensors" for p in files):
        return {}
    variant = variant_of(weight_names(configs / name, "model")[0].name, "model")
    chosen = [p for p in files if variant_of(p.name, "model") in ("", variant)]  # "": other files than weights
    return {p.name.replace(f".{variant}", "") if variant else p.name: p for p in chosen}


def check_other_parts(teacher: Teacher) -> None:
    """Refuses parts that are copied unchanged (`_copy_other`) if stock diffusers cannot load them.

    Opens only these files with diffusers. Otherwise the mistake would appear at the export, after the training.

    Raises:
        UserError: diffusers cannot load a part; the message has diffusers' reason.
    """
    import diffusers

    configs = teacher.configs()
    index = read_object(configs / "model_index.json", teacher.source)
    ours = ("vae", *teacher.text_encoders)
    with TemporaryDirectory() as made:
        for name in [n for n, value in index.items() if isinstance(value, list) and n not in (*ours, "unet")]:
            if index[name][0] is None:
                continue
            (Path(made) / name).mkdir()
            files = _other_files(teacher, configs, name)
            for target, file in files.items():
                (Path(made) / name / target).symlink_to(file.absolute())
            if not files:
                say_once(f"{configs}: {name} is left out: its folder has no safetensors or JSON to copy")
                index[name] = [None, None]
        if index.get("safety_checker", ["?"])[0] is None:
            index["requires_safety_checker"] = False
        (Path(made) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        diffusers.utils.logging.disable_progress_bar()
        try:
            diffusers.DiffusionPipeline.from_pretrained(made, local_files_only=True, unet=None, **dict.fromkeys(ours))
        except Exception as error:  # any type of error, depending on the classes of the parts
            lines = str(error).replace(made, str(configs)).splitlines() or [""]
            raise UserError(
                f"{configs}: stock diffusers cannot open the parts that the student shares "
                f"({type(error).__name__}: {lines[0][:300]}): fix that part, or delete its line in model_index.json"
            ) from error
        finally:
            diffusers.utils.logging.enable_progress_bar()
