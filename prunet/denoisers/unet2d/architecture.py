"""The U-Net of Stable Diffusion v1, v2 and SDXL."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from prunet.denoisers.architecture import Architecture, Config, Net, check_shapes
from prunet.denoisers.condition import Condition
from prunet.denoisers.form import Form
from prunet.denoisers.pairs import Level, Pair
from prunet.denoisers.unet2d import attention, compatibility, form, guidance, inputs
from prunet.denoisers.unet2d.adapters import UNetAdapters
from prunet.denoisers.unet2d.diagram import unet_diagram
from prunet.denoisers.unet2d.pairs import find_pairs
from prunet.denoisers.unet2d.weights import check_form, weight_map
from prunet.diagram import Diagram


class UNet2D(Architecture):
    """`UNet2DConditionModel`: levels down, a mid block, and levels up, with skip connections between them."""

    class_name = "UNet2DConditionModel"
    part = "unet"
    levels = ("block", "layer", "attention", "transformer")
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
    last_layer = "conv_out"
    ends: ClassVar = {
        "ResnetBlock2D": ("conv2", "conv_shortcut"),
        "Transformer2DModel": ("proj_out",),
        "Downsample2D": ("conv",),
        "Upsample2D": ("conv",),
    }
    adapters = UNetAdapters()
    parts_help = "levels, mid_block, their resnets, attentions, transformer_blocks"

    @override
    def make(self, config: Config) -> Net:
        return form.make_unet(config)

    @override
    def parts(self, config: Config) -> list[str]:
        return [name for name in self.module_names(config) if form.PART.fullmatch(name)]

    @override
    def outline(self, config: Config) -> str:
        last = len(config["down_block_types"]) - 1
        return f"U-Net with the levels down_blocks.0 to .{last}, mid_block and up_blocks.0 to .{last}"

    @override
    def form(self, config: Config, removed: Mapping[str, str]) -> Form:
        net = self.skeleton(config)
        student = form.student_config(config, net, removed)
        mapping, left = form.module_map(net, removed), self.skeleton(student)
        weights = weight_map(net, left, mapping)
        return Form(student, mapping, weights, check_form(net, left, removed, mapping))

    @override
    def pairs(self, teacher: Config, form: Form, level: Level) -> tuple[Pair, ...]:
        pairs = find_pairs(self.skeleton(teacher), self.skeleton(form.config), form.module_map, level)
        check_shapes(self, teacher, form.config, pairs)
        return tuple(pairs)

    @override
    def loads_in(self, config: Config) -> dict[str, str]:
        return compatibility.loads_in(config, self.skeleton(config))

    @override
    def works_with(self, teacher: Config, form: Form) -> dict[str, str]:
        return compatibility.works_with(self.skeleton(teacher), self.skeleton(form.config), form.module_map)

    @override
    def diagram(self, config: Config, gone: Iterable[str]) -> Diagram:
        return unet_diagram(self.skeleton(config), gone)

    @override
    def native_latent_size(self, config: Config) -> tuple[int, int]:
        return inputs.native_latent_size(config)

    @override
    def side_step(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # each level except the last halves both sides

    @override
    def example_inputs(self, config: Config, batch_size: int = 1, **given: Any) -> dict[str, Any]:
        return inputs.example_inputs(config, batch_size, **given)

    @override
    def call(self, net: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        out: Tensor = net(noisy, timestep, **inputs.arguments(condition, noisy.dtype), return_dict=False)[0]
        return out

    @override
    def takes_guidance(self, config: Config) -> bool:
        return guidance.takes_guidance(config)

    @override
    def with_guidance(self, form: Form) -> Form:
        return guidance.with_guidance(form)

    @override
    def fast_attention(self, nets: Iterable[Net], device: torch.device, *, half: bool) -> AbstractContextManager[None]:
        return attention.fast_attention(nets, device, half=half)


UNET2D = UNet2D()
