"""A few real distillation steps on this device with random weights: how long an image takes."""

import time

import torch
from accelerate import Accelerator

from prunet import unet
from prunet.losses import feature_losses, mse
from prunet.plan import Derived
from prunet.size import example_inputs
from prunet.taps import tap
from prunet.training import Runtime

STEPS = 2


def seconds_per_image(derived: Derived, latent_size: tuple[int, int], batch_size: int, runtime: Runtime) -> float:
    """Seconds for one image of a distillation step (teacher, student forward and backward, optimizer)."""
    accelerator = Accelerator(mixed_precision=runtime.mixed_precision, cpu=runtime.torch_device.type == "cpu")
    with torch.device(accelerator.device):
        teacher = unet.make_unet(derived.teacher_config).to(runtime.dtype).eval().requires_grad_(False)
        student = unet.make_unet(derived.student_config).train()
    if runtime.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    ours = [student.get_submodule(pair.student) for pair in derived.pairs()]
    theirs = [teacher.get_submodule(pair.teacher) for pair in derived.pairs()]
    model, optimizer = accelerator.prepare(student, torch.optim.AdamW(student.parameters(), lr=1e-6))

    def inputs(config: dict, dtype: torch.dtype) -> dict:
        return example_inputs(config, batch_size, latent_size=latent_size, device=accelerator.device, dtype=dtype)

    with tap(ours) as student_features, tap(theirs) as teacher_features:
        for step in range(STEPS + 1):
            if step == 1:  # the first one warms up
                start = time.perf_counter()
            with torch.no_grad():
                eps_t = teacher(**inputs(derived.teacher_config, runtime.dtype)).sample
            eps_s = model(**inputs(derived.student_config, torch.float32)).sample
            features = feature_losses(student_features.take(), teacher_features.take())
            accelerator.backward(mse(eps_s, eps_t) + features.sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS / batch_size
