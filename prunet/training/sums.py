"""Sums of the losses of several steps, for the next row of the log."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sums:
    """The sums of the losses since the last row of the log, on the device.

    A checkpoint keeps them, so a run that was stopped between two rows writes the same rows as one that was not.
    """

    def __init__(self, names: Sequence[str], device: torch.device, kept: dict[str, Any] | None) -> None:
        before = kept or {"sums": {}, "steps": 0, "seconds": 0.0}
        self.names = list(names)
        self.steps: int = before["steps"]
        self.values = torch.tensor([before["sums"].get(name, 0.0) for name in names], device=device)
        self._clock: float = time.perf_counter() - before["seconds"]

    @property
    def seconds(self) -> float:
        """The time of these steps."""
        return time.perf_counter() - self._clock

    def means(self, values: Tensor) -> dict[str, float]:
        """Returns the means of a step by name. `values` (len(names),): the sums, averaged over the processes."""
        return dict(zip(self.names, (values / self.steps).tolist(), strict=True))

    def clear(self) -> None:
        """Resets the sums, after a row was written."""
        self.values.zero_()
        self.steps, self._clock = 0, time.perf_counter()

    def kept(self) -> dict[str, Any]:
        """Returns the values for a checkpoint."""
        sums = dict(zip(self.names, self.values.tolist(), strict=True))
        return {"sums": sums, "steps": self.steps, "seconds": round(self.seconds, 4)}
