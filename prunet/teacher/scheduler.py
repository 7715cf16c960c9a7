"""The scheduler of a pipeline: its class, and the noise schedule of the teacher's training."""

from typing import TYPE_CHECKING, Any

from prunet.errors import UserError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def noise_scheduler(config: dict[str, Any], source: str) -> "DDPMScheduler":
    """Makes the forward process of the teacher at `source`, from its scheduler's config.

    Raises:
        UserError: the config has another process or prediction type, or its betas are not a noise schedule.
    """
    from diffusers import DDPMScheduler

    name = scheduler_class(config).__name__
    if name.startswith(("EDM", "FlowMatch")):  # DDPMScheduler would accept the config, with another meaning
        raise UserError(f"{source}: trained for {name}; prunet supports the noise schedule of SD v1, v2 and SDXL")
    scheduler = from_config(DDPMScheduler, config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{source}: prediction type {scheduler.config.prediction_type!r} is not supported")
    kept = scheduler.alphas_cumprod
    if not bool(((kept >= 0) & (kept <= 1)).all()):  # False for NaN, too
        raise UserError(f"{source}: the betas of scheduler/scheduler_config.json are not a noise schedule")
    return scheduler


def scheduler_class(config: dict[str, Any]) -> Any:
    """Returns the class of diffusers that a scheduler's config names.

    Raises:
        UserError: there is no such class.
    """
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise UserError(
            f"The teacher's scheduler {config.get('_class_name')!r} is not one of diffusers': correct _class_name in "
            "its scheduler/scheduler_config.json"
        )
    return cls


def from_config(cls: Any, config: dict[str, Any]) -> Any:
    """Makes a scheduler.

    Raises:
        UserError: diffusers cannot make a scheduler from this config.
    """
    try:
        return cls.from_config(config)
    except Exception as error:  # any type of error, since diffusers does not check the numbers
        raise UserError(f"The teacher's scheduler/scheduler_config.json makes no {cls.__name__} ({error})") from error
