"""The forms of a denoiser's adapters, for `prunet adapt`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet.denoisers.form import Form
from prunet.errors import UserError


class AdapterForms:
    """The adapters of one class of denoisers. All classes have LoRAs; the methods provide for the other adapters.

    Works on skeletons (models on the meta device).
    """

    controlnet: str | None = None  # diffusers' class of its ControlNets; None: prunet does not carry them over
    controlnet_loader: Path  # code that loads a whole ControlNet of the teacher for a student

    def original_names(self, net: Any) -> dict[str, str]:
        """Maps each module to its name in the files of the model's authors, if that name differs."""
        return {}

    def attentions(self, net: Any) -> list[str]:
        """Lists the attention modules in the order in which an IP-Adapter numbers them.

        Raises:
            UserError: prunet does not know the IP-Adapters of this class.
        """
        raise UserError(f"prunet carries over no IP-Adapter of a {type(net).__name__}: give a LoRA or a ControlNet")

    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        """Makes the ControlNet of `config` on the meta device.

        Raises:
            UserError: diffusers cannot make it, or it was made for another model than `teacher`.
        """
        raise NotImplementedError

    def cut_controlnet(self, control: Any, teacher: Any, student: Any, form: Form) -> Any:
        """Cuts the teacher's ControlNet by the plan into a stock ControlNet; None if diffusers has no such form."""
        return None

    def residuals(self, control: Any, teacher: Any, student: Any, form: Form) -> dict[str, Any]:
        """Returns what `controlnet_loader` needs to know about the residuals that the student takes."""
        raise NotImplementedError
