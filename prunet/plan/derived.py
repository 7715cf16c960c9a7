"""All that follows from a plan and a teacher's config."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunet.denoisers.base import LEVELS, Level, Pair
from prunet.errors import UserError
from prunet.plan.plan import Plan
from prunet.plan.size import Size


@dataclass(frozen=True)
class Derived:
    """All that follows from a plan and a teacher's config (`derive`)."""

    plan: Plan
    teacher_config: dict[str, Any]
    student_config: dict[str, Any]
    removed: dict[str, str]  # part -> the pattern that removed it
    implied: tuple[str, ...]  # parts that go with them (the sampler that led to a removed stage)
    weight_map: dict[str, str]  # student parameter -> teacher parameter
    loads_in: dict[str, str]  # program -> "yes", or why not
    works_with: dict[str, str]  # addition to the teacher, such as a ControlNet -> "yes", or why not

    @cached_property
    def teacher_size(self) -> Size:
        from prunet.plan.size import size_of

        return size_of(self.teacher_config)

    @cached_property
    def student_size(self) -> Size:
        from prunet.plan.size import size_of

        return size_of(self.student_config)

    def pairs(self, level: Level = "block") -> "tuple[Pair, ...]":
        """The modules that distillation compares at `level` (see `prunet.denoisers.unet2d.pairs`)."""
        from prunet.denoisers.unet2d import form as unet
        from prunet.denoisers.unet2d.pairs import find_pairs

        mapping = unet.module_map(self.teacher_config, self.removed)
        return find_pairs(self.teacher_config, self.student_config, mapping, level)

    def facts(self) -> dict[str, Any]:
        """Everything as plain JSON types (`prunet inspect --json`, `plan.json` in a run)."""
        teacher, student = self.teacher_size, self.student_size
        return {
            "plan": {**dataclasses.asdict(self.plan), "remove": list(self.plan.remove)},
            "parameters": {"teacher": teacher.parameters, "student": student.parameters},
            "macs": {"teacher": teacher.macs, "student": student.macs},
            "attention_macs": {"teacher": teacher.attention_macs, "student": student.attention_macs},
            "removed": sorted(self.removed),
            "implied": list(self.implied),
            "teacher_config": self.teacher_config,
            "student_config": self.student_config,
            "pairs": {level: [dataclasses.asdict(pair) for pair in self.pairs(level)] for level in LEVELS},
            "weight_map": self.weight_map,
            "loads_in": self.loads_in,
            "works_with": self.works_with,
        }


def derive(config: Mapping[str, Any], plan: Plan) -> Derived:
    """Student config, weight map, pairs and where the student will load, from the teacher's config alone.

    Raises:
        UserError: a pattern matches nothing or a part that cannot go; the stages are uneven; a kept layer would meet
            a skip connection of another width; diffusers has no form for the result.
    """
    from prunet.denoisers.unet2d import form as unet
    from prunet.plan.compatibility import loads_in, works_with

    teacher = json.loads(json.dumps(dict(config)))  # plain JSON types: a config is data
    removed = unet.removed_parts(teacher, plan.remove)
    student = unet.student_config(teacher, removed)
    mapping = unet.module_map(teacher, removed)
    weight_map = _weight_map(teacher, student, mapping)
    implied = _check_form(teacher, student, removed, mapping)
    return Derived(
        plan=plan,
        teacher_config=teacher,
        student_config=student,
        removed=removed,
        implied=implied,
        weight_map=weight_map,
        loads_in=loads_in(student),
        works_with=works_with(teacher, student, mapping),
    )


def _weight_map(teacher: dict, student: dict, mapping: Mapping[str, str]) -> dict[str, str]:
    """Student parameter -> teacher parameter; every shape must agree, which is where a wrong skip shows."""
    from prunet.denoisers.unet2d import form as unet

    source = unet.skeleton(teacher).state_dict()
    out = {}
    for name, tensor in unet.skeleton(student).state_dict().items():
        origin = unet.teacher_name(name, mapping)
        if origin not in source:
            raise UserError(
                f"The student needs {name}, and the teacher has no {origin} to give it: the plan removes a stage whose "
                "place the next one cannot take; remove the stages at the deep end (down_blocks' last, up_blocks.0)"
            )
        if source[origin].shape != tensor.shape:
            part = ".".join(origin.split(".")[:4])
            raise UserError(
                f"{part} was made for another width than it would meet: {origin} is {tuple(source[origin].shape)}, its "
                f"place in the student ({name}) needs {tuple(tensor.shape)}; keep the layer whose skip connection has "
                f"that width: of three up layers the first and last fit, so remove up_blocks.*.{{resnets,attentions}}.1"
            )
        out[name] = origin
    return out


def _check_form(teacher: dict, student: dict, removed: Mapping[str, str], mapping: Mapping[str, str]) -> tuple:
    """Counts the blocks kept against the blocks built, since diffusers does not say what it did not build.

    Returns the parts that go without having been named: the samplers towards stages that are gone.
    """
    from prunet.denoisers.unet2d import form as unet

    parts = {n for n in unet.module_names(teacher) if unet.PART.fullmatch(n)}
    gone = {n for n in parts if any(n == r or n.startswith(r + ".") for r in removed)}
    names = [n for n in unet.module_names(student) if unet.PART.fullmatch(n)]
    built = {unet.teacher_name(n, mapping) for n in names}
    back = sorted(built & gone)
    if back:
        raise UserError(
            f"diffusers has no form without {back[0]} (pattern {removed.get(back[0], back[0])!r}): it would build it "
            "again; leave it in the plan's model, or remove its whole stage"
        )
    missing = sorted(parts - gone - built)
    implied = tuple(n for n in missing if n.split(".")[2:3] in (["downsamplers"], ["upsamplers"]))
    if len(implied) != len(missing):
        lost = next(n for n in missing if n not in implied)
        raise UserError(
            f"diffusers has no form that keeps {lost}: the student would lose it; remove it in the plan too"
        )
    modules, origin = (
        dict(unet.skeleton(student).named_modules()),
        dict(unet.skeleton(teacher).named_modules()),
    )
    for name, module in modules.items():
        heads = getattr(module, "heads", None)
        if heads is not None and heads != origin[unet.teacher_name(name, mapping)].heads:
            raise UserError(
                f"{name} would have {heads} heads, the teacher's has another number: remove its stage instead"
            )
    return tuple(n for n in implied if not n.endswith(".0"))
