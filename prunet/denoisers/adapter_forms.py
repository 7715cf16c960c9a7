"""The forms of a denoiser's adapters, for `prunet adapt`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunet.denoisers.form import Form


@dataclass(frozen=True)
class Residuals:
    """The residuals of the teacher's ControlNet that a student has a place for."""

    down: tuple[int, ...]  # for each residual of the student, in order, its number among the teacher's
    mid: bool  # whether the student has a place for the residual of the mid block


class AdapterForms(ABC):
    """LoRA, IP-Adapter and ControlNet of one class of denoisers. Works on skeletons (models on the meta device)."""

    controlnet: str  # diffusers' class of its ControlNets
    controlnet_loader: Path  # code that loads a teacher's ControlNet for a student that has no stock one

    @abstractmethod
    def original_names(self, net: Any) -> dict[str, str]:
        """Maps each module with weights to its name in the files of the model's authors."""

    @abstractmethod
    def attentions(self, net: Any) -> list[str]:
        """Lists the attention modules in the order in which an IP-Adapter numbers them."""

    @abstractmethod
    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        """Makes the ControlNet of `config` on the meta device.

        Raises:
            UserError: diffusers cannot make it, or it was made for another model than `teacher`.
        """

    @abstractmethod
    def residuals(self, teacher: Any, student: Any, form: Form) -> Residuals:
        """Returns the residuals of a ControlNet of `teacher` that the student has a place for."""

    @abstractmethod
    def cut_controlnet(self, control: Any, teacher: Any, student: Any, form: Form) -> Any:
        """Cuts the teacher's ControlNet by the plan into a stock ControlNet; None if diffusers has no such form."""
