"""The teacher's guided path from pure noise to the clean picture, with every step between."""

from typing import Any

import torch
from torch import Tensor

from prunet.denoisers.condition import Condition
from prunet.errors import UserError
from prunet.recipe.stage import FEW_STEP_SAMPLER, Stage
from prunet.sampling.samplers import check_sampler, sampler_of
from prunet.teacher.guidance import guided
from prunet.teacher.teacher import Teacher

#: The sampler of paths, and the keys of the teacher's scheduler for the noise schedule (not those for its steps).
SAMPLER = "dpmsolver++"
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def schedule_of(teacher: Teacher) -> dict[str, Any]:
    """Returns the config of the scheduler, which decides a path together with the sampler's name."""
    config = teacher.noise_scheduler.config
    return {**{name: config[name] for name in SCHEDULE if name in config}, "timestep_spacing": "trailing"}


def path_times(teacher: Teacher, steps: int) -> Tensor:
    """Returns the timesteps (steps,) at which the teacher was called on a path, from pure noise on."""
    scheduler = sampler_of(SAMPLER, schedule_of(teacher))
    scheduler.set_timesteps(steps)
    times: Tensor = scheduler.timesteps
    return times


@torch.no_grad()
def draw_path(
    teacher: Teacher, noise: Tensor, condition: Condition, empty: Condition, *, steps: int, guidance_scale: float
) -> Tensor:
    """Draws latents (B, steps + 1, C, h, w) from `noise` (B, C, h, w) to the clean ones, in fp32 on the CPU.

    A stock sampler goes from the last timestep to the first ("trailing"). `empty`: the condition of no prompt, one row.
    """
    scheduler = sampler_of(SAMPLER, schedule_of(teacher))
    scheduler.set_timesteps(steps)
    device, dtype, call = teacher.device, teacher.dtype, teacher.architecture.call
    condition, empty = condition.to(device, dtype), empty.to(device, dtype)
    path = [noise]
    for at in scheduler.timesteps:
        noisy, timestep = path[-1].to(device, dtype), at.to(device).expand(len(noise))
        output = guided(call, teacher.unet, noisy, timestep, condition, empty, guidance_scale)
        path.append(scheduler.step(output.float().cpu(), at, path[-1], return_dict=False)[0])
    return torch.stack(path, dim=1)


def check_jumps(teacher: Teacher, stage: Stage, where: str) -> None:
    """Refuses jumps that do not fit the teacher's noise schedule. `where`: the stage in the recipe.

    Raises:
        UserError: the jumps do not divide the timesteps, or are more than their sampler supports; there are fewer
            timesteps than jumps or steps of the path; the path's sampler makes another number of steps; or the teacher
            predicts the noise, but the last timestep is pure noise, from which no picture follows.
    """
    process = teacher.process
    for key, count in (("jumps", stage.jumps or 1), ("path_steps", stage.path_steps)):
        if count > process.num_timesteps:
            raise UserError(
                f"{where}.{key}: {count} are more than the {process.num_timesteps} timesteps of {teacher.source}"
            )
    if stage.has("paths") and process.num_timesteps % (stage.jumps or 1):
        raise UserError(
            f"{where}.jumps: {stage.jumps} do not divide the {process.num_timesteps} timesteps of {teacher.source}: a "
            "stock sampler would land between two of them"
        )
    if stage.has("paths") and (made := len(path_times(teacher, stage.path_steps))) != stage.path_steps:
        raise UserError(f"{where}.path_steps: of {stage.path_steps}, {SAMPLER} makes {made}, by rounding: give another")
    if stage.jumps:
        check_sampler(FEW_STEP_SAMPLER, stage.jumps, teacher.part_config("scheduler"), teacher.source, where)
    if process.prediction_type == "epsilon" and process.alphas_cumprod[-1] <= 0:
        raise UserError(
            f"{where}: {teacher.source} predicts the noise, and at its last timestep there is nothing else (zero "
            f"terminal SNR): objective {stage.objective} needs prediction_type v_prediction there"
        )
