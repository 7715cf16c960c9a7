"""Samplers by name: schedulers of diffusers, set as Stable Diffusion ships them."""

from collections.abc import Mapping
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
from prunet.teacher.marks import ZERO_SNR
from prunet.teacher.placing import known_fields

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
# however few its steps are (arXiv 2305.08891). Options of the pipeline's own scheduler (stochastic, Karras) are not
# taken over, because a name stands for one sampler.
_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SAMPLER_OPTIONS: dict[str, dict[str, Any]] = {
    "dpmsolver++": {"algorithm_type": "dpmsolver++", "solver_order": 2, **_PLAIN},
    "euler": _PLAIN,
    "unipc": {"solver_order": 2, **_PLAIN},
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


def check_sampler(name: str, steps: int, schedule: Mapping[str, Any], source: str, where: str = "") -> None:
    """Refuses a sampler that does not exist, or that cannot draw in `steps` steps on a noise schedule.

    `schedule`: the config of the scheduler of the pipeline `source`. `where`: the part of the recipe with the sampler.
    """
    where = where and f"{where}."
    if name not in SAMPLERS:
        raise UserError(f"{where}sampler: no sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    if steps > (most := schedule.get("num_train_timesteps", 1000)):
        raise UserError(f"{where}steps: {steps} are more than the {most} timesteps of {source}")
    if schedule.get(ZERO_SNR) and not known_fields(SAMPLERS[name], {ZERO_SNR: True}):
        raise UserError(
            f"{where}sampler: {name} ignores {ZERO_SNR} in scheduler/scheduler_config.json of {source}, so it would "
            "draw with the wrong noise: choose another, such as ddim"
        )
    try:
        sampler_of(name, schedule).set_timesteps(steps)
    except Exception as error:  # any kind of error, since diffusers does not check the values
        raise UserError(
            f"{where}steps: {name} cannot draw in {steps} steps by scheduler/scheduler_config.json of {source} "
            f"({error}): choose another number or sampler"
        ) from error
