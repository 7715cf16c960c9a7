"""Guidance distillation at a fixed scale (arXiv 2210.03142, section 3.1, for one scale).

One call of the student gives the guided output of two calls of its teacher.
"""

from collections.abc import Sequence

from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.denoisers.pairs import Pair
from prunet.recipe.stage import Stage
from prunet.teacher.guidance import guided
from prunet.teacher.teacher import Teacher
from prunet.training.objectives.distillation import Distillation


class Guidance(Distillation):
    """Distillation from the teacher's guided output; the features are those of its call with the prompt.

    Args:
        empty: the condition of no prompt, as one row.
    """

    def __init__(self, teacher: Teacher, student: Net, pairs: Sequence[Pair], stage: Stage, empty: Condition) -> None:
        super().__init__(teacher, student, pairs, stage)
        self._empty, self._guidance = empty, stage.guidance_scale or 0.0

    def _teach(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        call = self._teacher.architecture.call
        return guided(call, self._net, noisy, timestep, condition, self._empty, self._guidance)
