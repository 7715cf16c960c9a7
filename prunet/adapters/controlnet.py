"""A ControlNet of the teacher for the student: cut by the plan, or whole, with the residuals that have a place.

Cut, it is a stock model of the student's form. Where diffusers has none (without a mid block), the whole one is copied,
with the file that loads it, and `adapted.json`, which says what of it is taken.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet.disk.files import new_folder, write_json
from prunet.errors import UserError
from prunet.plan.derived import Derived
from prunet.student.folder import write_unet
from prunet.teacher import placing
from prunet.teacher.configs import check_config, read_object
from prunet.teacher.weight_files import find_weights

CONFIG, MARK = "config.json", "adapted.json"
STEM = "diffusion_pytorch_model"


def open_controlnet(folder: Path, derived: Derived) -> Any:
    """The ControlNet in a stock folder, in the precision of its file.

    Raises:
        UserError: none there, damaged, or made for another model than the teacher.
    """
    config, forms = read_object(folder / CONFIG, str(folder)), derived.architecture.adapters
    if forms.controlnet is None:
        raise UserError(f"{folder}: prunet carries over no ControlNet of a {derived.architecture.class_name}")
    if (name := config.get("_class_name")) != (wanted := forms.controlnet):
        raise UserError(f"{folder}: holds a {name}; of folders prunet carries over those of a {wanted}")
    check_config(derived.architecture.part, {**derived.teacher_config, **config}, folder / CONFIG)
    try:
        control = forms.empty_controlnet(config, derived.teacher_skeleton)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    files = find_weights(folder, STEM, str(folder.parent), folder.name)
    placed = placing.place(control, placing.headers(files))
    placing.check_finite(placed)
    return placing.fill(control, placed)


def write_controlnet(control: Any, derived: Derived, output: Path, mark: Mapping[str, Any]) -> dict[str, Any]:
    """Writes it for the student as a folder; what is said of it in `MARK` is returned."""
    forms, nets = derived.architecture.adapters, (derived.teacher_skeleton, derived.student_skeleton, derived.form)
    small = forms.cut_controlnet(control, *nets)
    facts = {**mark, "form": "whole" if small is None else "cut"}
    if small is None:
        facts |= forms.residuals(control, *nets)
    with new_folder(output, "adapter") as part:
        write_unet(small or control, part)
        write_json(part / MARK, facts)
        if small is None:
            shutil.copyfile(forms.controlnet_loader, part / forms.controlnet_loader.name)
    return facts
