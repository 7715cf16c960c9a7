"""Latency and peak memory of denoisers, side by side in one run."""

import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet.size import example_inputs

#: After this many, three repeats of each are enough.
MOST_SECONDS = 60


@dataclass(frozen=True)
class Speed:
    """One call of a denoiser: median latency, and the most memory in use (None where the system does not tell)."""

    latency_ms: float
    peak_memory_mb: float | None


@torch.no_grad()
def measure(
    denoisers: Mapping[str, nn.Module],
    *,
    batch_size: int = 2,
    repeats: int = 15,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Times the denoisers in turn, so that what disturbs the machine disturbs them all.

    `batch_size` 2 is one picture with guidance. Each runs at its own native size, in its own precision.
    """
    device = torch.device(device)
    calls = {name: _call(net, batch_size, device) for name, net in denoisers.items()}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - began > MOST_SECONDS:
            break
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    speeds = {
        name: asdict(Speed(statistics.median(times[name]), _peak_memory_mb(net, calls[name], device)))
        for name, net in denoisers.items()
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtypes = {name: str(next(net.parameters()).dtype).removeprefix("torch.") for name, net in denoisers.items()}
    return {
        "device": where,
        "batch_size": batch_size,
        "repeats": min(map(len, times.values())),
        "dtypes": dtypes,
        "speeds": speeds,
    }


def _call(net: nn.Module, batch_size: int, device: torch.device) -> Any:
    dtype = next(net.parameters()).dtype
    inputs = example_inputs(dict(net.config), batch_size, device=device, dtype=dtype)  # type: ignore[arg-type]
    return lambda: net(**inputs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory_mb(net: nn.Module, call: Any, device: torch.device) -> float | None:
    """Weights, and what one call needs beside them at its worst moment."""
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (weights + torch.cuda.max_memory_allocated(device) - before) / 2**20
    before_kb = resident_kb("VmRSS")
    if before_kb is None or not reset_peak():
        return None
    call()
    peak_kb = resident_kb("VmHWM") or before_kb
    return weights / 2**20 + max(0, peak_kb - before_kb) / 1024


def resident_kb(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def reset_peak() -> bool:
    """Linux: forget the process's highest memory use so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
