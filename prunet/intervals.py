"""Numbers with 95 % intervals: bootstrap, jackknife, Student's t."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GROUPS = 20  # groups that the jackknife leaves out in turn
RESAMPLES = 2000  # resamples of the bootstrap


def parts_of(values: NDArray[Any], rows: int) -> list[NDArray[Any]]:
    """Splits `values` into pieces of `rows` rows; the last one may be shorter."""
    return [values[at : at + rows] for at in range(0, len(values), rows)]


@dataclass(frozen=True)
class Measure:
    """A number and its 95 % interval over the drawn pictures; the real pictures are taken as fixed.

    Recall is the exception: it is a mean over the real pictures, and so is its interval.
    """

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float] | Array) -> Measure:
    """Returns the mean of `values`, one for each picture, with its 95 % interval."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap(len(values), lambda which: values[which].mean(axis=-1))


def bootstrap(count: int, measure: Callable[[NDArray[np.int64]], Any]) -> Measure:
    """Returns a measure of `count` pictures, with an interval from percentiles over resampled pictures.

    `measure` gets the indices of the pictures to use, (..., count), and returns a value for each row.
    """
    chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(
        np.concatenate([np.atleast_1d(measure(part)) for part in parts_of(chosen, 100)]), [2.5, 97.5]
    )
    return Measure(float(measure(np.arange(count))), float(low), float(high))


def jackknife(value: float, count: int, measure: Callable[[NDArray[np.int64]], float]) -> Measure:
    """Returns `value`, which need not be a mean, with an interval from leaving out each of `GROUPS` random groups once.

    Resampling with replacement would repeat pictures, which FID and KID take for a lack of variety.
    """
    order = np.random.default_rng(0).permutation(count)
    groups = np.array_split(order, min(GROUPS, count))
    without = [measure(np.setdiff1d(order, group)) for group in groups]
    spread = 1.96 * float(np.sqrt((len(groups) - 1) * np.var(without)))
    return Measure(value, value - spread, value + spread)


# Student's t at 97.5 % for 1 to 10 degrees of freedom: half the width of a 95 % interval in standard errors. The last
# value also serves for more than 10, where it is a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Summary:
    """Values, their mean (None without values), and half the width of its 95 % interval (None below two values)."""

    values: list[float]
    mean: float | None
    interval: float | None


def summary(values: Sequence[float]) -> Summary:
    """Returns the mean of values with an interval by Student's t."""
    interval = None
    if len(values) > 1:
        t = T_975[min(len(values) - 2, len(T_975) - 1)]
        interval = t * statistics.stdev(values) / math.sqrt(len(values))
    return Summary(list(values), statistics.fmean(values) if values else None, interval)
