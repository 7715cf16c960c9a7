"""How the adapters of a class of denoisers are made: what `prunet adapt` asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunet.denoisers.form import Form


@dataclass(frozen=True)
class Residuals:
    """Which residuals of the teacher's ControlNet a student has a place for."""

    down: tuple[int, ...]  # for each of the student's, in order, the place among the teacher's
    mid: bool


class AdapterForms(ABC):
    """LoRA, IP-Adapter and ControlNet of one class of denoisers. Works on skeletons (models on the meta device)."""

    controlnet: str  # diffusers' name of the class of its ControlNets
    controlnet_loader: Path  # a file that loads one of the teacher's for a student without a stock one

    @abstractmethod
    def original_names(self, net: Any) -> dict[str, str]:
        """Module -> its name in the files of the model's authors, of all modules with weights."""

    @abstractmethod
    def attentions(self, net: Any) -> list[str]:
        """The attention modules in the order in which an IP-Adapter counts them."""

    @abstractmethod
    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        """The ControlNet of `config` on the meta device.

        Raises:
            UserError: diffusers cannot make it, or it was made for another model than `teacher`.
        """

    @abstractmethod
    def residuals(self, teacher: Any, student: Any, form: Form) -> Residuals:
        """Which of the residuals of a ControlNet made for `teacher` the student has a place for."""

    @abstractmethod
    def cut_controlnet(self, control: Any, teacher: Any, student: Any, form: Form) -> Any:
        """The stock ControlNet that the plan leaves of the teacher's; None where diffusers has no such form."""
