"""The weight map of a U-Net's student, and a check that diffusers builds the blocks that the plan keeps."""

from collections.abc import Mapping

from torch import nn

from prunet.denoisers.form import teacher_name
from prunet.denoisers.patterns import is_within
from prunet.denoisers.unet2d.form import PART
from prunet.errors import UserError


def weight_map(teacher: nn.Module, student: nn.Module, mapping: Mapping[str, str]) -> dict[str, str]:
    """Maps each parameter of the student to one of the teacher; a difference in shape shows a wrong skip connection."""
    source = teacher.state_dict()
    out = {}
    for name, tensor in student.state_dict().items():
        origin = teacher_name(name, mapping)
        if origin not in source:
            raise UserError(
                f"The student needs {name}, but the teacher has no {origin}: the next level cannot take the place of a "
                "removed level: remove the deepest levels instead (down_blocks' last, up_blocks.0)"
            )
        if source[origin].shape != tensor.shape:
            part = ".".join(origin.split(".")[:4])
            raise UserError(
                f"{part} was made for another width than it would meet: {origin} is {tuple(source[origin].shape)}, its "
                f"place in the student ({name}) needs {tuple(tensor.shape)}: keep the layer with a skip connection of "
                f"that width: of three up layers the first and last fit, so remove up_blocks.*.{{resnets,attentions}}.1"
            )
        out[name] = origin
    return out


def check_form(
    teacher: nn.Module, student: nn.Module, removed: Mapping[str, str], mapping: Mapping[str, str]
) -> tuple[str, ...]:
    """Compares the blocks that the plan keeps with the blocks that diffusers builds, because it does not report them.

    Returns the parts that are removed without a pattern: the samplers towards removed levels.
    """
    origin, modules = dict(teacher.named_modules()), dict(student.named_modules())
    parts = {n for n in origin if PART.fullmatch(n)}
    gone = {n for n in parts if is_within(n, set(removed))}
    names = [n for n in modules if PART.fullmatch(n)]
    built = {teacher_name(n, mapping) for n in names}
    back = sorted(built & gone)
    if back:
        raise UserError(
            f"diffusers has no form without {back[0]} (pattern {removed.get(back[0], back[0])!r}), and would build it "
            "again: keep it, or remove its whole level"
        )
    missing = sorted(parts - gone - built)
    implied = tuple(n for n in missing if n.split(".")[2:3] in (["downsamplers"], ["upsamplers"]))
    if len(implied) != len(missing):
        lost = next(n for n in missing if n not in implied)
        raise UserError(
            f"diffusers has no form that keeps {lost}, so the student would lose it: remove it in the plan too"
        )
    for name, module in modules.items():
        heads = getattr(module, "heads", None)
        if heads is not None and heads != origin[teacher_name(name, mapping)].heads:
            raise UserError(
                f"{name} would have {heads} heads, but the teacher's has another number: remove its level instead"
            )
    return tuple(n for n in implied if not n.endswith(".0"))
