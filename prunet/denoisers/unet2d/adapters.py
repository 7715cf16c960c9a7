"""The adapters of a U-Net."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.form import Form
from prunet.denoisers.unet2d import controlnet
from prunet.denoisers.unet2d.ldm_names import ldm_names


class UNetAdapters(AdapterForms):
    """LoRA, IP-Adapter and ControlNet of `UNet2DConditionModel`."""

    controlnet = "ControlNetModel"
    controlnet_loader = Path(__file__).parent / "student_controlnet.py"

    @override
    def original_names(self, net: Any) -> dict[str, str]:
        return ldm_names(net)

    @override
    def attentions(self, net: Any) -> list[str]:
        return [name.removesuffix(".processor") for name in net.attn_processors]

    @override
    def empty_controlnet(self, config: Mapping[str, Any], teacher: Any) -> Any:
        return controlnet.empty_controlnet(config, teacher)

    @override
    def residuals(self, control: Any, teacher: Any, student: Any, form: Form) -> dict[str, Any]:
        taken = controlnet.residuals(teacher, student, form.module_map)
        return {"residuals": list(taken.down), "mid_residual": taken.mid}

    @override
    def cut_controlnet(self, control: Any, teacher: Any, student: Any, form: Form) -> Any:
        if controlnet.without_form(student):
            return None
        taken = controlnet.residuals(teacher, student, form.module_map)
        return controlnet.cut_controlnet(control, form.config, taken, form.module_map)
