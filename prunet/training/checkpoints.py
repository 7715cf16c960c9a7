"""Checkpoints of a stage: written whole, only the newest few kept, and refused if they are of another stage."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from prunet.console import say
from prunet.denoisers.architecture import Net
from prunet.disk.files import aside, new_folder, read_label, write_json
from prunet.disk.seals import verify
from prunet.errors import UserError, is_out_of_memory
from prunet.processes import is_main
from prunet.recipe.training import Training
from prunet.training.fsdp import local, piece, whole

#: Settings that may change while a stage is stopped: its pace and length, not what is learned.
PACE = {"steps", "learning_rate", "schedule", "warmup_steps", "max_grad_norm"}


@dataclass(frozen=True)
class Saving:
    """Steps between two checkpoints, and the number of checkpoints to keep."""

    every: int = 1000
    keep: int = 2


@dataclass
class State:
    """The content of a checkpoint: the student's trained weights, optimizer, average, fp16's loss scaler."""

    student: Net
    optimizer: Any
    ema: EMAModel | None
    scaler: Any


def trained_parameters(student: Net) -> dict[str, nn.Parameter]:
    """Returns the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    """Lists the whole checkpoints of a stage, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def save(now: State, folder: Path, step: int, stage: Training, keep: int, unlogged: dict[str, Any]) -> None:
    """Writes the state after `step` steps, and deletes all checkpoints except the newest `keep`.

    `unlogged`: sums of the losses since the last row of the log. All processes must call this, because each may have a
    piece of the state. The main process writes the whole state, so a checkpoint does not depend on the number of
    processes.
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
        scaler = now.scaler.state_dict() if now.scaler is not None else None
        label = {"step": step, "stage": stage.settings(), "scaler": scaler, "unlogged": unlogged}
        write_json(part / "state.json", label)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(aside(old), ignore_errors=True)
        old.replace(aside(old))  # otherwise a killed process could leave half of it under its final name
    for left in (folder / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(left)


def _in_full(value: Any, like: torch.Tensor | None = None) -> Any:
    """Returns a value of the state in full, on the CPU of the process that writes.

    A gathered tensor leaves the device at once, because the device may not have room for all of them.
    """
    full = whole(value, like)
    if full is value:
        return value.contiguous() if isinstance(value, torch.Tensor) else value
    return full.cpu() if is_main() else None


def _mapped(state: dict[str, Any], change: Any, student: Net) -> dict[str, Any]:
    """Returns an optimizer's state with each value (moments, counts) mapped together with its parameter."""
    parameters = list(trained_parameters(student).values())
    moments = {
        number: {key: change(value, parameters[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def check_stage(folder: Path, stage: Training) -> tuple[dict[str, Any], list[str]]:
    """Returns the state of the newest checkpoint, and the settings of the stage that have changed after it.

    The state has `step`, `stage`, `scaler` and `unlogged`; it is empty without a checkpoint.

    Raises:
        UserError: `stage` cannot resume from this checkpoint.
    """
    saved = checkpoints(folder)
    if not saved:
        return {}, []
    fix = f"damaged is {saved[-1]}: {_before(saved)}"
    state = read_label(saved[-1] / "state.json", ("step", "stage", "scaler"), fix)
    now = stage.settings()
    changed = sorted(k for k in {*now, *state["stage"]} if state["stage"].get(k) != now.get(k))
    if set(changed) - PACE:
        key = next(k for k in changed if k not in PACE)
        before, after = (settings.get(key, "its default") for settings in (state["stage"], now))
        raise UserError(
            f"{saved[-1]}: trained with {key} {before}, now {after}: set it back, give another output, or delete "
            f"{folder / 'checkpoints'}"
        )
    if state["step"] == stage.steps and changed:
        raise UserError(
            f"{saved[-1]}: the stage is finished, with {changed[0]} {state['stage'][changed[0]]}, now "
            f"{now[changed[0]]}: set it back, raise steps to resume, or give another output"
        )
    if state["step"] > stage.steps:
        raise UserError(f"{saved[-1]}: already past steps {stage.steps}: raise it, or delete {folder / 'checkpoints'}")
    return state, changed


def _before(saved: list[Path]) -> str:
    return f"delete it to resume from {saved[-2]}" if len(saved) > 1 else "delete it to begin again"


def _check_bits(moments: Mapping[str, Any], optimizer: Any, path: Path) -> None:
    """Refuses moments in 8 bits for an optimizer that keeps 32, and the other way round: it would fail at a step."""
    kept = {key for state in moments["state"].values() for key in state}
    before = "state1" in kept  # bitsandbytes' name of the first moment
    now = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("bitsandbytes")
    if kept and before != now:
        raise UserError(
            f"{path}: its optimizer was {'' if before else 'not '}in 8 bits: resume with{'' if before else 'out'} "
            f"--use-8bit-adam, or delete {path.parent} to begin again"
        )


def resume(into: State, folder: Path, stage: Training) -> tuple[int, dict[str, Any] | None]:
    """Loads the newest checkpoint; returns its step (0 without a checkpoint) and `unlogged`."""
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
        _check_bits(moments, into.optimizer, saved[-1])
        into.optimizer.load_state_dict(_mapped(moments, piece, into.student))
        if into.ema:
            shadow = load_file(saved[-1] / "ema.safetensors")
            into.ema.shadow_params = [local(piece(shadow[name], p)).to(p.device) for name, p in named.items()]
            into.ema.optimization_step = state["step"]
        if into.scaler is not None and state["scaler"]:
            into.scaler.load_state_dict(state["scaler"])
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{saved[-1]}: damaged or of another student ({error}): {before}") from error
    how = "".join(f", {k} {state['stage'][k]} -> {now[k]}" for k in changed)
    say(f"Resuming from step {state['step']} of {stage.steps}{how}")
    return int(state["step"]), state.get("unlogged")  # absent in checkpoints of older versions
