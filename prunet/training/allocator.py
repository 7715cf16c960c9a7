"""The C library's memory, kept from one step to the next."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Freed memory is kept for what comes next, on a CPU under glibc.

    glibc gives a large block back to the system as soon as it is free, and the system zeroes it page by page when it is
    asked for again: for every feature map of every step, up to half of a step's time. At the end all is given back.
    """
    if device.type != "cpu" or sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        yield
        return
    # For as long as the process lives: once it is told a threshold, glibc no longer moves its own.
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.malloc_trim(0)
