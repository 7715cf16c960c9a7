"""Everything that follows from a plan, as a value that a run keeps (`plan.json`)."""

from typing import Any

from prunet.denoisers.diagram import Diagram
from prunet.denoisers.known import architecture_of
from prunet.denoisers.pairs import Pair
from prunet.disk.values import Value
from prunet.plan.plan import Plan


class PlanResult(Value):
    """A plan, and everything that follows from it and the teacher's config. Sizes have keys `teacher` and `student`."""

    plan: Plan
    parameters: dict[str, int]
    macs: dict[str, int]
    attention_macs: dict[str, int]
    removed: list[str]
    implied: list[str]
    teacher_config: dict[str, Any]
    student_config: dict[str, Any]
    pairs: dict[str, list[Pair]]
    weight_map: dict[str, str]
    loads_in: dict[str, str]
    works_with: dict[str, str]

    def diagram(self) -> Diagram:
        """Returns the teacher's diagram without the parts that the plan removes."""
        architecture = architecture_of(self.teacher_config)
        return architecture.diagram(self.teacher_config, [*self.removed, *self.implied])
