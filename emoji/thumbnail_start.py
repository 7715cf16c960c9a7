"""Starts an AutoencoderKL as a thumbnail codec instead of random weights.

With random weights the first thousand steps go into learning that latents should look like the picture, made
small. Those weights can be written down instead: colours pass every level along the residual path, three
latent channels hold the picture averaged over 8x8 pixels, and the decoder interpolates them. Every residual
branch starts at zero, so that training begins with a codec that works, and adds to it.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLORS = 3
CONSTANT = 4.0  # much larger than a colour, so that a group norm divides by nearly the same number everywhere


def _copy_colors(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Makes output channel k input channel k, filtered by `kernel`; other channels stay random."""
    conv.weight[:COLORS] = 0
    conv.bias[:COLORS] = 0
    for k in range(COLORS):
        conv.weight[k, k] = kernel


def _center(conv: nn.Conv2d) -> Tensor:
    size = conv.kernel_size[0]
    kernel = torch.zeros(size, size)
    kernel[size // 2, size // 2] = 1
    return kernel


def _spread_for_norm(conv: nn.Conv2d, group_size: int) -> None:
    """Makes one group per colour: +x, -x, +C, -C. Its mean is zero, and its variance hardly depends on x."""
    for k in range(COLORS):
        first = k * group_size
        conv.weight[first : first + 4] = 0
        conv.weight[first, k], conv.weight[first + 1, k] = 1, -1
        conv.bias[first : first + 4] = torch.tensor([0, 0, CONSTANT, -CONSTANT])


def _read_after_norm(conv: nn.Conv2d, group_size: int) -> None:
    """Inverts the activation exactly: silu(a) - silu(-a) = a."""
    sigma = CONSTANT * (2 / group_size) ** 0.5
    conv.weight[:COLORS] = 0
    conv.bias[:COLORS] = 0
    for k in range(COLORS):
        conv.weight[k, k * group_size, 1, 1], conv.weight[k, k * group_size + 1, 1, 1] = sigma, -sigma


def _silence_branches(model: AutoencoderKL) -> None:
    for module in model.modules():
        if hasattr(module, "conv2"):  # a residual block
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if hasattr(module, "to_out"):  # an attention
            nn.init.zeros_(module.to_out[0].weight)
            nn.init.zeros_(module.to_out[0].bias)
        if getattr(module, "conv_shortcut", None) is not None:
            _copy_colors(module.conv_shortcut, torch.ones(1, 1))


@torch.no_grad()
def start_as_thumbnail(model: AutoencoderKL) -> None:
    """Needs channels that change at the last block of each half, and groups of four channels or more."""
    groups = model.config.norm_num_groups
    encoder, decoder = model.encoder, model.decoder
    _silence_branches(model)

    _copy_colors(encoder.conv_in, _center(encoder.conv_in))
    encoder.conv_in.bias[:COLORS] = -1  # white becomes 0, the value convolutions pad with
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    for block in encoder.down_blocks[:-1]:
        _copy_colors(block.downsamplers[0].conv, average)
    wide, narrow = model.config.block_out_channels[-1] // groups, model.config.block_out_channels[0] // groups
    _spread_for_norm(encoder.down_blocks[-1].resnets[0].conv_shortcut, wide)
    _read_after_norm(encoder.conv_out, wide)
    encoder.conv_out.weight[4:] *= 0.1
    model.quant_conv.weight[:] = torch.eye(8)[:, :, None, None]
    # Little noise at first: with a variance of one, the decoder would see nothing else.
    model.quant_conv.bias[:] = torch.tensor([0.0] * 4 + [-8.0] * 4)

    model.post_quant_conv.weight[:] = torch.eye(4)[:, :, None, None]
    model.post_quant_conv.bias[:] = 0
    _copy_colors(decoder.conv_in, _center(decoder.conv_in))
    tent = torch.tensor([0.25, 0.5, 0.25])
    for block in decoder.up_blocks[:-1]:
        _copy_colors(block.upsamplers[0].conv, tent[:, None] * tent[None, :])
    _spread_for_norm(decoder.up_blocks[-1].resnets[0].conv_shortcut, narrow)
    _read_after_norm(decoder.conv_out, narrow)
    decoder.conv_out.bias[:] = 1
