"""Fast attention on a CPU by chunks of queries; docs/log.md has the timings."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from prunet.denoisers.architecture import Net

#: Scores in a chunk. They take 64 MB (1,024 queries of 8 heads against 4,096 keys); larger chunks are not faster.
SCORES = 2**25
#: Most scores of which the probabilities are kept for the backward pass; beyond this it computes them again.
KEPT = 2**22


@contextmanager
def fast_attention(nets: Iterable[Net], device: torch.device, *, half: bool) -> Iterator[None]:
    """Computes the stock attention of `nets` with `Chunked` inside the `with` block, if they run on a CPU in bf16.

    PyTorch's fused kernel is slow there. For 4,096 tokens of 8 heads of 40 channels (the first level of Stable
    Diffusion at 512 px) matmuls over many queries at a time take half the time, forward and backward, and keep as
    little memory.
    """
    before = [(net, net.attn_processors) for net in nets if device.type == "cpu" and half]
    for net, processors in before:
        stock = {name: type(p) is AttnProcessor2_0 for name, p in processors.items()}
        net.set_attn_processor({name: _Processor() if stock[name] else p for name, p in processors.items()})
    try:
        yield
    finally:
        for net, processors in before:
            net.set_attn_processor(processors)


class _Processor:
    """Computes the attention of a `Transformer2DModel`; everything else is left to diffusers' `AttnProcessor2_0`."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = args[0] if args else kwargs.get("encoder_hidden_states")
        masked = len(args) > 1 or kwargs.get("attention_mask") is not None
        special = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
        if masked or hidden_states.dim() != 3 or attn.residual_connection or any(x is not None for x in special):
            out: Tensor = AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)
            return out
        context = hidden_states if context is None else context
        parts = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        heads = Chunked.apply(*(part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts))
        out = attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))
        scaled: Tensor = out / attn.rescale_output_factor
        return scaled


class Chunked(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v of queries (B, H, N, d) and keys and values (B, H, M, d), in their precision.

    If the probabilities are few, they are kept; if they are many, the backward pass computes each chunk's again (like
    arXiv 2205.14135, section 3.1). The chunks' gradients of keys and values are summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the attention's output (B, H, N, d)."""
        keys, v = (k * k.shape[-1] ** -0.5).transpose(-1, -2).contiguous(), v.contiguous()
        out = torch.empty_like(q)
        for rows in _chunks(q, v):
            p = torch.softmax(q[:, :, rows] @ keys, -1)
            out[:, :, rows] = p @ v
        ctx.save_for_backward(q, keys, v, out, *([p] if _scores(q, v) <= KEPT else []))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of queries, keys and values."""
        q, keys, v, out, *kept = ctx.saved_tensors
        (grad,) = grads
        k, values = (x.transpose(-1, -2).contiguous() for x in (keys, v))  # k is scaled already
        grad_q, grad_k, grad_v = torch.empty_like(q), *(torch.zeros_like(x, dtype=torch.float32) for x in (v, v))
        mean = (grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)
        for rows in _chunks(q, v):
            p = kept[0] if kept else torch.softmax(q[:, :, rows] @ keys, -1)
            slope = (grad[:, :, rows] @ values).sub_(mean[:, :, rows]).mul_(p)
            grad_q[:, :, rows] = slope @ k
            grad_k += slope.transpose(-1, -2) @ q[:, :, rows]
            grad_v += p.transpose(-1, -2) @ grad[:, :, rows]
        return grad_q, (grad_k * q.shape[-1] ** -0.5).to(q.dtype), grad_v.to(q.dtype)


def _scores(q: Tensor, v: Tensor) -> int:
    return q[..., 0].numel() * v.shape[2]


def _chunks(q: Tensor, v: Tensor) -> list[slice]:
    step = max(64, SCORES * q.shape[2] // _scores(q, v))
    return [slice(i, i + step) for i in range(0, q.shape[2], step)]
