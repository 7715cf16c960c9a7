"""Checkpoints of a stage: written whole, the last few kept, and refused where they are of another stage."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from prunet.console import say
from prunet.denoisers.architecture import Net
from prunet.disk.files import aside, new_folder, read_label, write_json
from prunet.disk.seals import verify
from prunet.errors import UserError
from prunet.processes import is_main
from prunet.recipe.training import Training
from prunet.training.fsdp import local, piece, whole

#: What may be changed between two parts of one stage: how fast it goes and how far, not what is learned.
PACE = {"steps", "learning_rate", "schedule", "warmup_steps", "max_grad_norm"}


@dataclass(frozen=True)
class Saving:
    """How often a checkpoint is written, in steps, and how many of the last ones stay."""

    every: int = 1000
    keep: int = 2


class Companion(Protocol):
    """A network that is trained beside the student, with an optimizer of its own; equal in all processes."""

    def step(self, learning_rate: float) -> None:
        """Its training that belongs to a step of the student, after it."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that decide how it goes on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts such a state in place."""


@dataclass
class State:
    """What a checkpoint keeps: what is trained of the student, its optimizer, its average, fp16's loss scaler, and the
    network beside it.
    """

    student: Net
    optimizer: Any
    ema: EMAModel | None
    scaler: Any
    companion: Companion | None = None


def trained_parameters(student: Net) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a stage, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def save(now: State, folder: Path, step: int, stage: Training, keep: int, unlogged: dict[str, Any]) -> None:
    """Writes the state after `step` steps aside, renames it, and drops all but the last `keep`.

    `unlogged`: what the losses add up to since the last row of the log.

    All processes come here, because each may hold a piece of the state; the main one writes. So a checkpoint does not
    show how many there were.
    """
    named = trained_parameters(now.student)
    state = {name: _in_full(parameter.detach()) for name, parameter in named.items()}
    shadows = zip(named.items(), now.ema.shadow_params, strict=True) if now.ema else ()
    average = {name: _in_full(shadow, like=parameter) for (name, parameter), shadow in shadows}
    moments = _mapped(now.optimizer.state_dict(), lambda value, _: _in_full(value), now.student)
    if not is_main():
        return
    with new_folder(folder / "checkpoints" / f"step-{step:07d}", "checkpoint") as part:
        save_file(state, part / "student.safetensors")
        if average:
            save_file(average, part / "ema.safetensors")
        torch.save(moments, part / "optimizer.pt")
        if now.companion:
            torch.save(now.companion.state_dict(), part / "companion.pt")
        scaler = now.scaler.state_dict() if now.scaler is not None else None
        label = {"step": step, "stage": stage.settings(), "scaler": scaler, "unlogged": unlogged}
        write_json(part / "state.json", label)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(aside(old), ignore_errors=True)
        old.replace(aside(old))  # or a kill would leave half of it under its name
    for left in (folder / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(left)


def _in_full(value: Any, like: torch.Tensor | None = None) -> Any:
    """A value of the state. What had to be gathered leaves the device at once, which may not have room for all of it,
    and is kept by the process that writes.
    """
    full = whole(value, like)
    if full is value:
        return value.contiguous() if isinstance(value, torch.Tensor) else value
    return full.cpu() if is_main() else None


def _mapped(state: dict[str, Any], change: Any, student: Net) -> dict[str, Any]:
    """An optimizer's state with each of its values (moments, counts) and the parameter that it belongs to changed."""
    parameters = list(trained_parameters(student).values())
    moments = {
        number: {key: change(value, parameters[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def check_stage(folder: Path, stage: Training) -> tuple[dict[str, Any], list[str]]:
    """The state of the last checkpoint (`step`, `stage`, `scaler`, `unlogged`; nothing where there is none), and which
    settings of the stage have changed since.

    Raises:
        UserError: `stage` cannot resume from it.
    """
    saved = checkpoints(folder)
    if not saved:
        return {}, []
    fix = f"damaged is {saved[-1]}: {_before(saved)}"
    state = read_label(saved[-1] / "state.json", ("step", "stage", "scaler"), fix)
    now = stage.settings()
    changed = sorted(k for k in now if state["stage"].get(k) != now[k])
    if set(changed) - PACE:
        key = next(k for k in changed if k not in PACE)
        raise UserError(
            f"{saved[-1]}: trained with {key} {state['stage'].get(key)}, now {now[key]}: set it back, give another "
            f"output, or delete {folder / 'checkpoints'}"
        )
    if state["step"] == stage.steps and changed:
        raise UserError(
            f"{saved[-1]}: the stage is finished, with {changed[0]} {state['stage'][changed[0]]}, now "
            f"{now[changed[0]]}: set it back, raise steps to resume, or give another output"
        )
    if state["step"] > stage.steps:
        raise UserError(f"{saved[-1]}: already past steps {stage.steps}: raise it, or delete {folder / 'checkpoints'}")
    return state, changed


def resume_companion(companion: Companion, folder: Path) -> None:
    """Puts its state in the last checkpoint in place."""
    saved = checkpoints(folder)
    try:
        companion.load_state_dict(torch.load(saved[-1] / "companion.pt", weights_only=True, map_location="cpu"))
    except Exception as error:
        raise UserError(f"{saved[-1]}: damaged or of another student ({error}): {_before(saved)}") from error


def _before(saved: list[Path]) -> str:
    return f"delete it to resume from {saved[-2]}" if len(saved) > 1 else "delete it to begin again"


def resume(into: State, folder: Path, stage: Training) -> tuple[int, dict[str, Any] | None]:
    """Puts the last checkpoint's state in place and returns its step (0 where there is none) and what is `unlogged`."""
    saved = checkpoints(folder)
    if not saved:
        return 0, None
    before = _before(saved)
    verify(saved[-1], f"damaged is {saved[-1]}: {before}")
    state, changed = check_stage(folder, stage)
    now = stage.settings()
    try:
        named = trained_parameters(into.student)
        weights = load_file(saved[-1] / "student.safetensors")
        if other := weights.keys() ^ named.keys():
            raise KeyError(min(other))
        into.student.load_state_dict({name: piece(weights[name], p) for name, p in named.items()}, strict=False)
        moments = torch.load(saved[-1] / "optimizer.pt", weights_only=True, map_location="cpu")
        into.optimizer.load_state_dict(_mapped(moments, piece, into.student))
        if into.ema:
            shadow = load_file(saved[-1] / "ema.safetensors")
            into.ema.shadow_params = [local(piece(shadow[name], p)).to(p.device) for name, p in named.items()]
            into.ema.optimization_step = state["step"]
        if into.scaler is not None and state["scaler"]:
            into.scaler.load_state_dict(state["scaler"])
    except Exception as error:
        raise UserError(f"{saved[-1]}: damaged or of another student ({error}): {before}") from error
    how = "".join(f", {k} {state['stage'][k]} -> {now[k]}" for k in changed)
    say(f"Resuming from step {state['step']} of {stage.steps}{how}")
    return int(state["step"]), state.get("unlogged")  # earlier versions had none
