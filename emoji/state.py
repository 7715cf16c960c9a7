"""What the training stages share: state on disk, a budget in minutes, a learning rate, several processes."""

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from prunet.disk.files import new_file, write_text


def atomic_save(value, path: Path) -> None:
    """Writes the state so that a kill at any moment leaves a whole file."""
    with new_file(path) as part:
        torch.save(value, part)


def save_state(path: Path, state: dict, **parts) -> None:
    """Saves the state of a step after its update; a resumed run starts with the next step."""
    atomic_save({**state, "step": state["step"] + 1, **parts}, path)


def load_state(path: Path) -> dict:
    """Returns the stage's state, or a new one; its `seconds` count against the budget."""
    if path.exists():
        return torch.load(path, map_location="cpu", weights_only=True)
    return {"step": 0, "seconds": 0.0, "images": 0}


def save_record(record: dict, path: Path) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_record(path: Path) -> dict:
    return json.loads(path.read_text())


def log_point(path: Path, state: dict, **measured: float) -> None:
    """Appends a line to the stage's curve."""
    point = {"step": state["step"] + 1, "images": state["images"], "hours": state["seconds"] / 3600, **measured}
    with path.open("a") as file:
        file.write(json.dumps({key: float(f"{value:.6g}") for key, value in point.items()}) + "\n")


def is_finished(record: Path, minutes: float) -> bool:
    """Returns whether a stage has spent its budget; with a larger budget it resumes from its state."""
    return record.exists() and read_record(record)["hours"] * 60 >= minutes


def timed_steps(title: str, state: dict, minutes: float, log_every_s: float = 30) -> Iterator[float]:
    """Yields the progress in [0, 1) at each step until the budget is spent; counts steps and seconds in `state`."""
    budget_s = 60 * minutes
    rank = dist.get_rank() if dist.is_initialized() else 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    last = last_log = time.monotonic()
    with Progress(*columns, disable=rank > 0) as bar:
        task = bar.add_task(title, total=budget_s, completed=state["seconds"])
        while state["seconds"] < budget_s:
            yield state["seconds"] / budget_s
            now = time.monotonic()
            state["seconds"] = from_first_rank(state["seconds"] + now - last)
            state["step"] += 1
            if not all(map(math.isfinite, state["shown"].values())):
                raise SystemExit(f"{title}: the loss is not finite at step {state['step']}: lower the learning rate")
            line = f"{title} step {state['step']} " + " ".join(f"{k} {v:.4f}" for k, v in state["shown"].items())
            bar.update(task, completed=min(state["seconds"], budget_s), description=line)
            if now - last_log > log_every_s and rank == 0 and not bar.console.is_terminal:
                print(f"{line} | {state['seconds'] / 60:.1f} of {minutes} min", flush=True)
                last_log = now
            last = now


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Returns the learning rate: linear warm-up, then a cosine to zero."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def smooth(old: float | None, new: float, keep: float = 0.98) -> float:
    return new if old is None else keep * old + (1 - keep) * new


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computes in bf16 where that is faster; CPUs without bf16 units are several times slower than in fp32."""
    if device.type == "cuda" or _bf16_is_faster():
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@functools.cache
def _bf16_is_faster() -> bool:
    return _matmul_s(torch.bfloat16) < _matmul_s(torch.float32)


def _matmul_s(dtype: torch.dtype) -> float:
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a  # the first call also picks a kernel
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return time.perf_counter() - start


# --- several processes, started by torchrun


def join_group() -> tuple[int, int]:
    """Returns (rank, number of processes) from the variables that torchrun sets."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def average_gradients(model: nn.Module) -> None:
    if not dist.is_initialized():
        return
    grads = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def from_first_rank(number: float) -> float:
    """Returns one time for all processes; otherwise one would stop while another waits for its gradients."""
    if not dist.is_initialized():
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()
