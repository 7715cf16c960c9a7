"""How the adapters of a class of denoisers are made: what `prunet adapt` asks of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet.denoisers.form import Form
from prunet.errors import UserError


class AdapterForms:
    """The adapters of one class of denoisers. All classes have LoRAs; the methods say what else this one has.

    Works on skeletons (models on the meta device).
    """

    controlnet: str | None = None  # diffusers' name of the class of its ControlNets, if prunet carries those over
    controlnet_loader: Path  # a file that loads a whole ControlNet of the teacher for a student

    def original_names(self, net: Any) -> dict[str, str]:
        """Module -> its name in the files of the model's authors, of modules that have another one there."""
        return {}

    def attentions(self, net: Any) -> list[str]:
        """The attention modules in the order in which an IP-Adapter counts them.

        Raises:
            UserError: prunet does not know how IP-Adapters of this class are made.
        """
        raise UserError(f"prunet carries over no IP-Adapter of a {type(net).__name__}, only LoRAs and ControlNets")

    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        """The ControlNet of `config` on the meta device.

        Raises:
            UserError: diffusers cannot make it, or it was made for another model than `teacher`.
        """
        raise NotImplementedError

    def cut_controlnet(self, control: Any, teacher: Any, student: Any, form: Form) -> Any:
        """The stock ControlNet that the plan leaves of the teacher's; None where diffusers has no such form."""
        return None

    def residuals(self, control: Any, teacher: Any, student: Any, form: Form) -> dict[str, Any]:
        """What `controlnet_loader` has to know of the residuals of the teacher's ControlNet that the student takes."""
        raise NotImplementedError
