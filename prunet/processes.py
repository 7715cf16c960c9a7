"""The processes that share the work of one command (`accelerate launch`, torchrun). Usually there is only one.

Process r of n does pieces r, r + n, r + 2 n, ... Work for only one process is done by the main process, while the
others wait. No result depends on the number of processes.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # these imports take seconds, and most commands need only the rank
    import torch
    from accelerate import PartialState

T = TypeVar("T")

#: How long the others wait while one process works alone, for example exports a pipeline. If a process dies, the
#: launcher stops the others.
PATIENCE = timedelta(hours=6)


def count() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Returns this process's number among all, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Returns whether this process is the one that writes files and prints."""
    return rank() == 0


def is_mine(piece: int) -> bool:
    """Returns whether this process does piece number `piece` of shared work."""
    return piece % count() == rank()


def local_rank() -> int:
    """Returns this process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: "torch.device") -> "PartialState":
    """Connects with the other processes, if there are any."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def leave() -> None:
    """Disconnects when all processes are done: a process that simply ends can abort one that still talks to it."""
    torch_distributed = sys.modules.get("torch.distributed")
    if count() > 1 and torch_distributed and torch_distributed.is_initialized():
        torch_distributed.barrier()
        torch_distributed.destroy_process_group()


def from_main(make: Callable[[], T]) -> T:
    """Waits for all processes, calls `make` in the main process, and returns its result in each process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    state.wait_for_everyone()
    value = [make() if state.is_main_process else None]
    out: T = broadcast_object_list(value)[0]
    return out


def gather(mine: Sequence[tuple[int, *tuple[Any, ...]]]) -> list[Any]:
    """Returns the pieces of all processes, sorted by their numbers. A piece is a tuple that begins with its number."""
    from accelerate.utils import gather_object

    return sorted(gather_object(list(mine)), key=lambda piece: piece[0])
