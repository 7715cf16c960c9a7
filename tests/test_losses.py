"""Losses and the diffusion process against values computed by hand or written another way."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunet.denoisers.taps import tap
from prunet.teacher.process import add_noise, min_snr_weight, training_target
from prunet.training.losses import feature_losses, mse


def test_mse_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 4.0], [0.0, 4.0]])
    assert mse(a, b).item() == (0 + 4 + 9 + 1) / 4
    assert mse(a, b, torch.tensor([1.0, 0.5])).item() == (1.0 * 4 / 2 + 0.5 * 10 / 2) / 2


def test_mse_of_half_precision_is_computed_in_full() -> None:
    a = torch.full((1000,), 0.01, dtype=torch.bfloat16)
    assert mse(a, torch.zeros_like(a)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_mse_is_that_of_autograd(dtype: torch.dtype) -> None:
    a, b = (torch.randn(5, 7).to(dtype).requires_grad_() for _ in range(2))
    ours = torch.autograd.grad(3 * mse(a, b), (a, b))
    theirs = torch.autograd.grad(3 * nn.functional.mse_loss(a.float(), b.float()), (a, b))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other)


def test_feature_losses_are_one_plain_mean_a_pair() -> None:
    student = [torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0, 3.0])]
    teacher = [torch.tensor([0.0, 3.0]), torch.tensor([0.0, 0.0, 0.0])]
    assert feature_losses(student, teacher).tolist() == [2.5, 3.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_process_is_that_of_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    x, noise = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    t = torch.tensor([0, 10, 500, 999])
    abar = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(add_noise(x, noise, abar), scheduler.add_noise(x, noise, t))
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(x, noise, t)
    torch.testing.assert_close(training_target(x, noise, abar, prediction_type), expected)


def test_min_snr_by_hand() -> None:
    abar = torch.tensor([0.9, 0.5, 0.0])  # SNR 9, 1, 0
    assert min_snr_weight(abar, 5.0, "epsilon").tolist() == pytest.approx([5 / 9, 1, 1])
    assert min_snr_weight(abar, 5.0, "v_prediction").tolist() == pytest.approx([5 / 10, 1 / 2, 0])


def test_taps_catch_outputs_and_are_gone_afterwards() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with tap([net[1], net[0]]) as features:
        out = net(torch.ones(1, 2))
        caught = features.take()
        assert torch.equal(caught[0], out)
        assert caught[1].shape == (1, 3)
        with pytest.raises(RuntimeError, match="did not run"):
            features.take()
        # Gradient checkpointing runs the module again in the backward pass: that output is not kept.
        out = checkpoint(net, torch.ones(1, 2, requires_grad=True), use_reentrant=False)
        assert torch.equal(features.take()[0], out)
        out.sum().backward()
        assert features == [None, None] and net[0].weight.grad is not None
    assert not net[0]._forward_hooks
    assert not net[1]._forward_hooks
    try:
        with tap([net[0]]):
            raise ValueError
    except ValueError:
        pass
    assert not net[0]._forward_hooks
