"""DreamBooth (arXiv 2208.12242, section 3.2): the usual loss on pictures of a subject.

The loss is also computed on pictures of the subject's class that the model drew before, so that the model does not
forget what the class looks like (prior preservation).
"""

from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.condition import Condition
from prunet.teacher.teacher import Teacher
from prunet.training.losses import mse
from prunet.training.objectives.objective import Objective
from prunet.training.session import Session


class Personalization(Objective):
    """The squared error on the `subject`, and `prior_weight` times that on its class (`prior`), if there is one.

    It calls no other model, because the pictures of the class lie in a cache.
    """

    def __init__(self, model: Teacher, prior_weight: float | None) -> None:
        self._call, self._process, self._prior_weight = model.architecture.call, model.process, prior_weight
        self.names = ("subject",) if prior_weight is None else ("subject", "prior")

    def start(self, session: Session) -> None:
        self._process = self._process.to(session.device)

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        latents, noise, timestep = (self._rows(batch, name) for name in ("latents", "noise", "timestep"))
        prefixes = ("", "class_")[: len(self.names)]
        conditions = [batch[f"{prefix}condition"] for prefix in prefixes]
        condition = Condition({name: torch.cat([each[name] for each in conditions]) for name in conditions[0]})
        noisy, target = (make(latents, noise, timestep) for make in (self._process.add_noise, self._process.target))
        ours = self._call(model, noisy, timestep, condition)
        terms = [mse(*both) for both in zip(ours.chunk(len(prefixes)), target.chunk(len(prefixes)), strict=True)]
        loss = terms[0] if self._prior_weight is None else terms[0] + self._prior_weight * terms[1]
        return loss, torch.stack(terms).detach()

    def _rows(self, batch: dict[str, Any], name: str) -> Tensor:
        """Returns the rows of the subject, then those of the class."""
        return torch.cat([batch[f"{prefix}{name}"] for prefix in ("", "class_")[: len(self.names)]])

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["subject"] + (self._prior_weight or 0.0) * means.get("prior", 0.0)}
