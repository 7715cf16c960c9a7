"""A ControlNet of the teacher for the student: cut by the plan, or whole.

If it is cut, it is a stock model of the student's form. If diffusers has no such form, the whole ControlNet is copied,
with the code that loads it, and `adapted.json`, which lists the residuals that the student takes.
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
    """Loads the ControlNet in a stock folder, in the precision of its file.

    Raises:
        UserError: the folder has no ControlNet, is damaged, or is for another model than the teacher.
    """
    config, forms = read_object(folder / CONFIG, str(folder)), derived.architecture.adapters
    if forms.controlnet is None:
        raise UserError(f"{folder}: prunet cannot carry over a ControlNet of a {derived.architecture.class_name}")
    if (name := config.get("_class_name")) != (wanted := forms.controlnet):
        raise UserError(f"{folder}: a {name}: give a folder with a {wanted}")
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
    """Writes the ControlNet for the student as a folder; returns the facts that `MARK` records about it."""
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
