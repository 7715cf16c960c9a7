"""The time of a call by kind of operation."""

import statistics
from collections.abc import Mapping

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from prunet.plan.size import KINDS, kind_of
from prunet.speed.clock import Call, K, seconds_of

#: Number of times that each call is profiled.
ROUNDS = 3
#: `other`: sums, copies, casts, fused code; `between`: the device waits for Python and launches.
PARTS = (*KINDS, "other", "between")


@torch.no_grad()
def times_by_kind(
    calls: Mapping[K, Call], latency_ms: Mapping[K, float], device: torch.device
) -> dict[K, dict[str, float]]:
    """Splits the `latency_ms` of each call, timed without the profiler, by kind of operation (`PARTS`).

    The calls take turns. The profiler slows calls down, especially those with many small operations, so only the share
    of each kind is taken from it. On a device that cannot be profiled, each call gets an empty mapping.
    """
    if device.type not in ("cpu", "cuda"):
        return {key: {} for key in calls}
    rounds = [{key: _profile(call, latency_ms[key], device) for key, call in calls.items()} for _ in range(ROUNDS)]
    out = {}
    for key in calls:
        parts = {part: statistics.median(found[key][part] for found in rounds) for part in PARTS}
        scale = latency_ms[key] / sum(parts.values())
        out[key] = {part: value * scale for part, value in parts.items()}
    return out


def _profile(call: Call, latency_ms: float, device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda], acc_events=True) as found:
        watched_ms = 1000 * seconds_of(call, device)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in found.key_averages():
        # The event of an operation includes the time of its kernels; their own events would count it twice.
        if event.device_type == DeviceType.CPU:
            parts[kind_of(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    # The profiler slows down operations on a CPU; on a GPU it slows only launches, not kernels.
    whole_ms = latency_ms if cuda else watched_ms
    return parts | {"between": max(0.0, whole_ms - sum(parts.values()))}
