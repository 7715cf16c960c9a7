"""Attention by chunks against the formula, PyTorch's own attention, and a whole U-Net."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from prunet.denoisers.unet2d import attention as cpu
from prunet.denoisers.unet2d.attention import Chunked, fast_attention
from prunet.denoisers.unet2d.inputs import example_inputs

CPU = torch.device("cpu")


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as in diffusers: a transposition puts the heads second."""
    torch.manual_seed(0)
    parts = (torch.randn(3, n, 2, 8, dtype=torch.float64).transpose(1, 2) for n in (queries, keys, keys))
    return [part.to(dtype).requires_grad_() for part in parts]


def outputs(attention, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns its output, and the gradients of a weighted sum of it."""
    out = attention(*parts)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, slope)]


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bhmd->bhnd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)


@pytest.mark.parametrize("scores", [1, cpu.SCORES])
@pytest.mark.parametrize("kept", [0, cpu.KEPT])
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (341, 7), (5, 5)])
def test_chunks_compute_the_formula_and_its_gradients(queries, keys, scores, kept, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "SCORES", scores)  # of 1: chunks of 64 queries
    monkeypatch.setattr(cpu, "KEPT", min(scores, kept))
    chunked = outputs(Chunked.apply, inputs(queries, keys, torch.float32))
    truth = outputs(formula, inputs(queries, keys, torch.float64))
    for ours, theirs in zip(chunked, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_in_bf16_it_errs_no_more_than_the_fused_kernel() -> None:
    truth = outputs(formula, inputs(1000, 1000, torch.float64))
    parts = inputs(1000, 1000, torch.bfloat16)
    for ours, fused, right in zip(
        outputs(Chunked.apply, parts), outputs(F.scaled_dot_product_attention, parts), truth, strict=True
    ):
        error, of_fused = ((x.double() - right).norm() / right.norm() for x in (ours, fused))
        assert error < max(1.5 * of_fused, 0.01)


@pytest.mark.parametrize("tokens", [1000, 200])
def test_it_keeps_few_scores(tokens: int) -> None:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Chunked.apply(*inputs(tokens, tokens, torch.float32))
    scores = 3 * 2 * tokens**2
    assert sum(kept) == 4 * 3 * 2 * tokens * 8 + (scores if scores <= cpu.KEPT else 0)
    assert (scores <= cpu.KEPT) == (tokens == 200)


def test_a_unet_computes_the_same_and_gets_its_own_attention_back(sd: Path) -> None:
    net = UNet2DConditionModel.from_pretrained(sd / "unet")
    given = example_inputs(dict(net.config), 2)
    given["encoder_hidden_states"].normal_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = net(**given).sample
        mask = torch.ones(2, given["encoder_hidden_states"].shape[1])
        mask[:, 1:] = 0
        expected = net(**given, encoder_attention_mask=mask).sample
        with fast_attention([net], CPU, half=True):
            assert {type(p).__name__ for p in net.attn_processors.values()} == {"_Processor"}
            plain = net(**given).sample
            masked = net(**given, encoder_attention_mask=mask).sample  # by the stock processor
        assert torch.equal(net(**given).sample, fused)
        with fast_attention([net], CPU, half=False):
            assert {type(p).__name__ for p in net.attn_processors.values()} == {"AttnProcessor2_0"}
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
    assert (expected - fused).abs().max() > 1e-3
    assert {type(p).__name__ for p in net.attn_processors.values()} == {"AttnProcessor2_0"}
