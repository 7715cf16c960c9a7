"""Guidance distillation (arXiv 2210.03142, section 3.1), at one scale or at one drawn for each sample.

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

    A scale in the condition of a sample (`guidance_scale`) replaces that of the stage; the student takes it as an
    input, the teacher does not.

    Args:
        empty: the condition of no prompt, as one row.
    """

    def __init__(self, teacher: Teacher, student: Net, pairs: Sequence[Pair], stage: Stage, empty: Condition) -> None:
        super().__init__(teacher, student, pairs, stage)
        self._empty, self._guidance = empty, stage.fixed_guidance

    def _teach(self, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        call, scale = self._teacher.architecture.call, condition.get("guidance_scale")
        plain = Condition({name: tensor for name, tensor in condition.items() if name != "guidance_scale"})
        by = self._guidance if scale is None else scale.view(-1, 1, 1, 1)
        return guided(call, self._net, noisy, timestep, plain, self._empty, by)
