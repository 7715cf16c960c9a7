"""Everything that follows from a plan and a teacher's config."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunet.denoisers.architecture import Architecture
from prunet.denoisers.form import Form
from prunet.denoisers.known import architecture_of
from prunet.denoisers.pairs import Level, Pair
from prunet.diagram import Diagram
from prunet.plan.effect import Effect, Size
from prunet.plan.plan import Plan
from prunet.plan.result import PlanResult
from prunet.plan.size import size_of


@dataclass(frozen=True)
class Derived:
    """Everything that follows from a plan and a teacher's config (`derive`)."""

    plan: Plan
    teacher_config: dict[str, Any]
    removed: dict[str, str]  # maps each removed part to its pattern
    form: Form  # the student's

    @property
    def architecture(self) -> Architecture:
        """The architecture of teacher and student."""
        return architecture_of(self.teacher_config)

    @property
    def student_config(self) -> dict[str, Any]:
        """The stock config of the student."""
        return self.form.config

    @property
    def weight_map(self) -> dict[str, str]:
        """Maps each parameter of the student to one of the teacher."""
        return self.form.weight_map

    @property
    def teacher_skeleton(self) -> Any:
        """The teacher's denoiser on the meta device."""
        return self.architecture.skeleton(self.teacher_config)

    @property
    def student_skeleton(self) -> Any:
        """The student on the meta device."""
        return self.architecture.skeleton(self.student_config)

    @cached_property
    def teacher_size(self) -> Size:
        """Size and MACs of the teacher, at its native size."""
        return size_of(self.teacher_config)

    @cached_property
    def student_size(self) -> Size:
        """Size and MACs of the student, at its native size."""
        return size_of(self.student_config)

    @cached_property
    def loads_in(self) -> dict[str, str]:
        """Maps each program to "yes", or to the reason why it cannot load the student."""
        return self.architecture.loads_in(self.student_config)

    @cached_property
    def works_with(self) -> dict[str, str]:
        """Maps each addition to the teacher, such as a ControlNet, to "yes", or to the reason why it does not fit."""
        return self.architecture.works_with(self.teacher_config, self.form)

    def pairs(self, level: Level = "block") -> tuple[Pair, ...]:
        """Returns the modules that distillation compares at `level`."""
        return self.architecture.pairs(self.teacher_config, self.form, level)

    def diagram(self) -> Diagram:
        """Returns the teacher's diagram without the parts that the plan removes."""
        return self.architecture.diagram(self.teacher_config, [*self.removed, *self.form.implied])

    def effect(self) -> Effect:
        """What `prunet inspect` shows."""
        return Effect(
            diagram=self.diagram(),
            teacher=self.teacher_size,
            student=self.student_size,
            loads_in=self.loads_in,
            works_with=self.works_with,
        )

    def result(self) -> PlanResult:
        """Returns everything as a value (`prunet inspect --json`, `plan.json` in a run)."""
        sizes = {"teacher": self.teacher_size, "student": self.student_size}
        return PlanResult(
            plan=self.plan,
            parameters={name: size.parameters for name, size in sizes.items()},
            macs={name: size.macs for name, size in sizes.items()},
            attention_macs={name: size.attention_macs for name, size in sizes.items()},
            removed=sorted(self.removed),
            implied=list(self.form.implied),
            teacher_config=self.teacher_config,
            student_config=self.student_config,
            pairs={level: list(self.pairs(level)) for level in self.architecture.levels},
            weight_map=self.form.weight_map,
            loads_in=self.loads_in,
            works_with=self.works_with,
        )


def derive(config: Mapping[str, Any], plan: Plan, *, guidance: bool = False) -> Derived:
    """Derives the student's config, weight map, pairs and programs from the teacher's config and a plan.

    `guidance`: the student takes the guidance scale as an input.

    Raises:
        UserError: a pattern matches nothing, or a part that cannot be removed; a U-Net's levels are uneven; a kept
            layer would meet a skip connection of another width; diffusers has no form for the result.
    """
    teacher = json.loads(json.dumps(dict(config)))  # plain JSON types: a config is data
    architecture = architecture_of(teacher)
    removed = architecture.removed_parts(teacher, plan.remove)
    form = architecture.form(teacher, removed)
    return Derived(plan, teacher, removed, architecture.with_guidance(form) if guidance else form)
