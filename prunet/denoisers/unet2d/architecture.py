"""The U-Net of Stable Diffusion v1, v2 and SDXL."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.architecture import Architecture, Config, Form, Net, Residuals, check_shapes
from prunet.denoisers.condition import Condition
from prunet.denoisers.drawing import Drawing
from prunet.denoisers.pairs import Level, Pair
from prunet.denoisers.unet2d import attention, compatibility, controlnet, form, inputs
from prunet.denoisers.unet2d.drawing import draw_unet
from prunet.denoisers.unet2d.ldm_names import ldm_names
from prunet.denoisers.unet2d.pairs import find_pairs
from prunet.denoisers.unet2d.weights import check_form, weight_map


class UNet2D(Architecture):
    """`UNet2DConditionModel`: stages down, a mid stage, and stages up, with skip connections between them."""

    class_name = "UNet2DConditionModel"
    part = "unet"
    levels = ("block", "layer", "attention", "transformer")
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
    controlnet = "ControlNetModel"
    controlnet_loader = Path(__file__).parent / "student_controlnet.py"
    parts_help = "stages, mid_block, their resnets, attentions, transformer_blocks"

    def make(self, config: Config) -> Net:
        return form.make_unet(config)

    def parts(self, config: Config) -> list[str]:
        return [name for name in self.module_names(config) if form.PART.fullmatch(name)]

    def outline(self, config: Config) -> str:
        last = len(config["down_block_types"]) - 1
        return f"U-Net, whose stages are down_blocks.0 to .{last}, mid_block and up_blocks.0 to .{last}"

    def form(self, config: Config, removed: Mapping[str, str]) -> Form:
        net = self.skeleton(config)
        student = form.student_config(config, net, removed)
        mapping, left = form.module_map(net, removed), self.skeleton(student)
        weights = weight_map(net, left, mapping)
        return Form(student, mapping, weights, check_form(net, left, removed, mapping))

    def pairs(self, teacher: Config, form: Form, level: Level) -> tuple[Pair, ...]:
        pairs = find_pairs(self.skeleton(teacher), self.skeleton(form.config), form.module_map, level)
        check_shapes(self, teacher, form.config, pairs)
        return tuple(pairs)

    def loads_in(self, config: Config) -> dict[str, str]:
        return compatibility.loads_in(config, self.skeleton(config))

    def works_with(self, teacher: Config, form: Form) -> dict[str, str]:
        return compatibility.works_with(self.skeleton(teacher), self.skeleton(form.config), form.module_map)

    def original_names(self, config: Config) -> dict[str, str]:
        return ldm_names(self.skeleton(config))

    def attentions(self, config: Config) -> list[str]:
        return [name.removesuffix(".processor") for name in self.skeleton(config).attn_processors]

    def empty_controlnet(self, config: Config, teacher: Config) -> Any:
        return controlnet.empty_controlnet(config, self.skeleton(teacher))

    def residuals(self, teacher: Config, form: Form) -> Residuals:
        return controlnet.residuals(self.skeleton(teacher), self.skeleton(form.config), form.module_map)

    def cut_controlnet(self, control: Any, teacher: Config, form: Form) -> Any:
        if controlnet.without_form(self.skeleton(form.config)):
            return None
        return controlnet.cut_controlnet(control, form.config, self.residuals(teacher, form), form.module_map)

    def drawing(self, config: Config, gone: Iterable[str]) -> Drawing:
        return draw_unet(self.skeleton(config), gone)

    def native_latent_size(self, config: Config) -> tuple[int, int]:
        return inputs.native_latent_size(config)

    def side_step(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # each stage but the last halves it

    def example_inputs(self, config: Config, batch_size: int = 1, **given: Any) -> dict[str, Any]:
        return inputs.example_inputs(config, batch_size, **given)

    def call(self, net: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        out: Tensor = net(noisy, timestep, **inputs.arguments(condition), return_dict=False)[0]
        return out

    def fast_attention(self, nets: Iterable[Net], device: torch.device, *, half: bool) -> AbstractContextManager[None]:
        return attention.fast_attention(nets, device, half=half)


UNET2D = UNet2D()
