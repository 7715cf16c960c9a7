"""Starts a U-Net as a copy of its input, which at high noise levels already predicts the noise.

As in the original SD code (and unlike the classes used here) every residual branch starts at zero. On top of
that the first skip connection carries the noisy latents to the last block, and the last convolution reads
them there. So training starts near a loss that random weights reach only after hundreds of steps.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

CONSTANT = 4.0  # much larger than a latent, so that the group norm divides by nearly the same number everywhere


@torch.no_grad()
def start_as_copy(model: UNet2DConditionModel) -> None:
    """Needs groups of at least four channels at the outermost level, one per latent channel."""
    for module in model.modules():
        for name in ("conv2", "proj_out"):  # the ends of residual blocks and of transformers
            if hasattr(module, name):
                nn.init.zeros_(getattr(module, name).weight)
                nn.init.zeros_(getattr(module, name).bias)

    width, latents = model.config.block_out_channels[0], model.config.in_channels
    group_size = width // model.config.norm_num_groups
    shortcut = model.up_blocks[-1].resnets[-1].conv_shortcut  # reads [hidden, skip]; this skip is conv_in's output
    middle = model.conv_in.kernel_size[0] // 2
    model.conv_in.weight[:latents] = 0
    model.conv_in.bias[:latents] = 0
    model.conv_out.weight[:] = 0
    model.conv_out.bias[:] = 0
    sigma = CONSTANT * (2 / group_size) ** 0.5
    for k in range(latents):
        model.conv_in.weight[k, k, middle, middle] = 1
        first, skipped = k * group_size, shortcut.in_channels - width + k
        shortcut.weight[first : first + group_size] = 0
        shortcut.weight[first, skipped], shortcut.weight[first + 1, skipped] = 1, -1
        # The group +x, -x, +C, -C has zero mean and a variance that hardly depends on x ...
        shortcut.bias[first : first + group_size] = 0
        shortcut.bias[first + 2], shortcut.bias[first + 3] = CONSTANT, -CONSTANT
        # ... and silu(a) - silu(-a) = a.
        model.conv_out.weight[k, first, middle, middle] = sigma
        model.conv_out.weight[k, first + 1, middle, middle] = -sigma
