"""Writes a student as a stock pipeline, and checks that diffusers opens it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from prunet.console import quiet_libraries
from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.freeze import freeze
from prunet.denoisers.known import architecture_of
from prunet.disk.files import new_folder
from prunet.exports.card import model_card, origin
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import made_for, write_made_for
from prunet.student.folder import write_unet
from prunet.teacher.copying import save_parts
from prunet.teacher.teacher import Teacher
from prunet.teacher.weight_files import WEIGHTS


def export(
    teacher: Teacher,
    student: Net,
    folder: Path | str,
    *,
    card: dict[str, Any] | None = None,
    fp16: bool = False,
    drawing: Drawing | None = None,
    what: str = "pipeline",
    made_from: str | None = None,
) -> Path:
    """Writes `student` with the teacher's other parts as a stock pipeline folder, and opens it again as a check.

    The other parts' weights are the teacher's, byte for byte. `fp16` adds the half-precision variant of the U-Net, the
    VAE and the text encoders (`from_pretrained(..., variant="fp16")`). `drawing`: how the student draws, if not like
    the teacher. `card` fills the model card. `what` and `made_from` go into the folder's seal. An
    existing folder is replaced.

    Raises:
        UserError: no space, or no permission.
        RuntimeError: the written files do not load to the same bits; they are deleted.
    """
    folder = Path(folder)
    with new_folder(folder, what, made_from) as part:
        save_parts(teacher, part)
        if drawing:
            write_made_for(part, drawing)
        write_unet(student, part / "unet")
        if fp16:
            _write_fp16(part, teacher)
        (part / "README.md").write_text(
            model_card({**(card or origin(teacher)), "made_for": drawing or made_for(teacher)}),
            encoding="utf-8",
        )
        check_export(part, student)
    return folder


def _write_fp16(folder: Path, teacher: Teacher) -> None:
    for part in ("unet", "vae", *teacher.text_encoders):
        files = list((folder / part).glob("*.safetensors"))  # a text encoder may be several; its variant is one
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(half, folder / part / f"{WEIGHTS[part]}.fp16.safetensors", metadata={"format": "pt"})


@quiet_libraries()
def check_export(folder: Path, student: Net) -> None:
    """Opens the folder with stock diffusers and compares the U-Net bit for bit: weights and one output.

    Raises:
        RuntimeError: weights or outputs differ.
    """
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    # Both are frozen, because a matmul may round differently if a weight requires a gradient.
    again, ours = (freeze(net.to("cpu")) for net in (pipe.unet, student))
    expected = ours.state_dict()
    got = again.state_dict()
    if got.keys() != expected.keys() or any(not torch.equal(got[k], expected[k].float()) for k in expected):
        raise RuntimeError(f"{folder}: the U-Net did not load to the same weights")
    config = config_of(ours)
    inputs = architecture_of(config).random_inputs(config)
    with torch.no_grad():
        if not torch.equal(again(**inputs).sample, ours.float()(**inputs).sample):
            raise RuntimeError(f"{folder}: the U-Net loaded by diffusers computes something else")
