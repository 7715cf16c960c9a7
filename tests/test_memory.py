"""The peak memory of a step: equal for fake and real tensors, and changed by the options that should change it."""

from typing import Any

import pytest
import torch
from conftest import SMALL_UNETS

from prunet import derive, load_plan
from prunet.denoisers.taps import tap
from prunet.denoisers.unet2d import form as unet
from prunet.denoisers.unet2d.attention import fast_attention
from prunet.denoisers.unet2d.inputs import example_inputs
from prunet.runtime import Runtime
from prunet.training.losses import feature_losses, mse
from prunet.training.memory import Living, step_memory

CPU = torch.device("cpu")


def peak(derived: Any, micro_batch: int = 2, accumulate: int = 1, **runtime: Any) -> int:
    return step_memory(
        derived.teacher_config,
        derived.student_config,
        derived.pairs("layer"),
        latent_size=(16, 16),
        micro_batch=micro_batch,
        accumulate=accumulate,
        runtime=Runtime(device="cpu", **{"precision": "no", **runtime}),
    )


@pytest.fixture(scope="module")
def derived() -> Any:
    stages = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "block_out_channels": [16, 32]}
    stages["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    return derive(dict(unet.make_unet(SMALL_UNETS["sd"] | stages).config), load_plan("bk-small"))


@pytest.mark.parametrize("half", [False, True])
def test_real_tensors_need_as_much_memory_as_fake_ones(derived: Any, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    teacher = unet.make_unet(derived.teacher_config).to(dtype).eval().requires_grad_(False)
    student, pairs = unet.make_unet(derived.student_config).train(), derived.pairs("layer")
    kept = {"batch_size": 2, "latent_size": (16, 16)}
    with (
        Living() as living,
        fast_attention([teacher, student], CPU, half=half),
        tap([student.get_submodule(pair.student) for pair in pairs]) as ours,
        tap([teacher.get_submodule(pair.teacher) for pair in pairs]) as theirs,
    ):
        with torch.no_grad():
            eps_t = teacher(**example_inputs(derived.teacher_config, dtype=dtype, **kept)).sample
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            eps_s = student(**example_inputs(derived.student_config, **kept)).sample
        (mse(eps_s, eps_t) + feature_losses(ours.take(), theirs.take()).sum()).backward()
    gradients = sum(p.grad.nbytes for p in student.parameters())
    assert peak(derived, precision="bf16" if half else "no") == pytest.approx(living.most - gradients, rel=0.1)


def test_a_tensor_counts_once_and_as_long_as_it_lives() -> None:
    with Living() as living:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        del a
        assert living.now == 4000
        c = b + 1
        assert living.now == 8000
        del b, c
    assert (living.now, living.most) == (0, 8000)


def test_feature_losses_keep_only_the_differences() -> None:
    features = [torch.randn(4, 8, 16, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(6)]
    with Living() as living:
        before = living.now
        loss = feature_losses(features, [feature.detach() + 1 for feature in features]).sum()
        assert living.now - before < 7 * features[0].nbytes  # neither the teacher's features nor copies in fp32
        loss.backward()


def test_options_that_save_memory_save_it(derived: Any) -> None:
    plain = peak(derived, micro_batch=8)
    assert peak(derived, micro_batch=8, gradient_checkpointing=True) < 0.7 * plain
    assert peak(derived, micro_batch=8, precision="bf16") < plain
    assert 1.8 * plain < peak(derived, micro_batch=16) < 2.2 * plain
    assert peak(derived, micro_batch=8, accumulate=2) > plain  # the second micro-batch meets gradients
