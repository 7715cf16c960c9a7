"""Latency and peak memory of calls, side by side in one run."""

import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.known import architecture_of
from prunet.disk.values import Value

Call = Callable[[], Any]
K = TypeVar("K")

#: After this many seconds, three repeats of each call are enough.
MOST_SECONDS = 60


@dataclass(frozen=True)
class Speed:
    """One call of a denoiser: median latency, and peak memory in MiB (None if the system does not report it)."""

    latency_ms: float
    peak_memory_mb: float | None


class Speeds(Value):
    """The speeds of several denoisers that were timed in turns, and the conditions."""

    device: str
    batch_size: int
    repeats: int
    dtypes: dict[str, str]
    speeds: dict[str, Speed]


@torch.no_grad()
def time_denoisers(
    denoisers: Mapping[str, nn.Module],
    *,
    repeats: int = 15,
    device: torch.device | str = "cpu",
) -> Speeds:
    """Times the denoisers in turns, so that a disturbance of the machine affects all of them.

    A call draws one picture with guidance (batch size 2) at the denoiser's native size, in its own precision.
    """
    device = torch.device(device)
    calls = {name: denoiser_call(net, 2, device=device) for name, net in denoisers.items()}
    times = times_in_turn(calls, repeats, device)
    speeds = {}
    for name, net in denoisers.items():
        working = working_mb(calls[name], device)
        peak = None if working is None else weights_mb(net) + working
        speeds[name] = Speed(statistics.median(times[name]), peak)
    return Speeds(
        device=device_name(device),
        batch_size=2,
        repeats=min(map(len, times.values())),
        dtypes={name: str(next(net.parameters()).dtype).removeprefix("torch.") for name, net in denoisers.items()},
        speeds=speeds,
    )


def denoiser_call(
    net: Net,
    batch_size: int,
    *,
    latent_size: tuple[int, int] | None = None,
    device: torch.device,
) -> Call:
    """Returns a call of the denoiser in its own precision (see `random_inputs`)."""
    dtype = next(net.parameters()).dtype
    inputs = random_inputs(config_of(net), batch_size, latent_size=latent_size, device=device, dtype=dtype)
    return lambda: net(**inputs)


def random_inputs(config: Mapping[str, Any], batch_size: int, **given: Any) -> dict[str, Any]:
    """Returns arguments of a denoiser (`Architecture.example_inputs`) with random latents and prompt embeddings.

    The latents are random, because a GPU that multiplies zeros uses less power and runs faster than on a picture.
    """
    inputs = architecture_of(config).example_inputs(config, batch_size, **given)
    generator = torch.Generator(given.get("device", "cpu")).manual_seed(0)
    for value in inputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.normal_(generator=generator)
    return inputs


def times_in_turn(calls: Mapping[K, Call], repeats: int, device: torch.device) -> dict[K, list[float]]:
    """Times each call `repeats` times, in milliseconds; the calls take turns, after one warm-up call each.

    Stops once `MOST_SECONDS` have passed and each call has three times.
    """
    for call in calls.values():
        call()
    times: dict[K, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - began > MOST_SECONDS:
            break
        for name, call in calls.items():
            times[name].append(1e3 * seconds_of(call, device))
    return times


def seconds_of(call: Call, device: torch.device) -> float:
    """Returns the seconds of one call, until the device has finished it."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or a CPU's number of threads."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def wait(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def weights_mb(net: nn.Module) -> float:
    """Returns the size of the parameters of `net` in MiB."""
    return sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20


def working_mb(call: Call, device: torch.device) -> float | None:
    """Returns the peak memory of a call beside the weights, in MiB; None if the system does not report it.

    On a CPU this is the growth of the process. Freed memory that the process still holds would hide some of it, so it
    is first returned to the system if the C library can do that (glibc); elsewhere the figure is too small.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if give_back is not None:
        give_back(0)
    before_kb = resident_kb("VmRSS")
    if before_kb is None or not reset_peak():
        return None
    call()
    peak_kb = resident_kb("VmHWM") or before_kb
    return max(0, peak_kb - before_kb) / 1024


def resident_kb(field: str, process: int | str = "self") -> int | None:
    """Returns a field of Linux's /proc/PROCESS/status, a process's memory in KiB; None on other systems."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def reset_peak() -> bool:
    """Resets the process's highest memory use (`VmHWM`); returns whether the system can, as Linux does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
