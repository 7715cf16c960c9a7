"""Samplers by name: schedulers of diffusers, set as Stable Diffusion ships them."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from prunet.errors import UserError
from prunet.teacher.teacher import Teacher

SAMPLERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "ddim-trailing": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
    "unipc": UniPCMultistepScheduler,
}
# As Stable Diffusion ships them. Without these, diffusers' defaults would clip latents to [-1, 1] (DDIM), and
# warm up over more steps than may be asked for (PNDM). The trailing sampler goes from pure noise to the clean picture,
# however few its steps are (arXiv 2305.08891).
SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False},
    "ddim-trailing": {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True},
    "lcm": {"clip_sample": False, "set_alpha_to_one": True},
    "pndm": {"skip_prk_steps": True},
}


def set_sampler(pipe: Any, name: str) -> Any:
    """Replaces the sampler of `pipe` by the named one, with the same noise schedule; returns `pipe`.

    Raises:
        UserError: there is no sampler of this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"No sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    # The pipeline's first schedule, because the config of an earlier sampler would pass its options on to this one.
    own = vars(pipe).setdefault("own_schedule", pipe.scheduler.config)
    pipe.scheduler = sampler_of(name, own)
    return pipe


def sampler_of(name: str, schedule: Any) -> Any:
    """Makes diffusers' scheduler for a sampler, with the noise schedule of `schedule`, another scheduler's config."""
    return SAMPLERS[name].from_config(schedule, **SAMPLER_OPTIONS.get(name, {}))


def check_sampler(teacher: Teacher, name: str, steps: int, where: str) -> None:
    """Refuses a sampler that does not exist, or that cannot run `steps` steps on the teacher's schedule.

    `where`: the part of the recipe with the sampler.
    """
    if name not in SAMPLERS:
        raise UserError(f"{where}.sampler: no sampler {name!r}: {', '.join(SAMPLERS)}")
    config = teacher.part_config("scheduler")
    if steps > (most := teacher.noise_scheduler.config.num_train_timesteps):
        raise UserError(f"{where}.steps: {steps} are more than the {most} timesteps of {teacher.source}")
    try:
        sampler_of(name, config).set_timesteps(steps)
    except Exception as error:  # any kind of error, since diffusers does not check the values
        raise UserError(
            f"{teacher.source}: its scheduler/scheduler_config.json cannot drive {name} for {steps} steps: {error}"
        ) from error
