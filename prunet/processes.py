"""The processes that share the work of one command (`accelerate launch`, torchrun). One alone is the usual case.

Process r of n does every n-th piece from the r-th on; what only one may do, the main process does, and the others
wait. Nothing that is computed depends on their number.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # to be imported takes seconds, and the terminal's output asks only who speaks
    import torch
    from accelerate import PartialState

T = TypeVar("T")

#: For how long the others wait while one process works alone (exports a pipeline, say). A process that died is the
#: launcher's business, which stops them all at once.
PATIENCE = timedelta(hours=6)


def count() -> int:
    """The number of processes; 1 as a rule."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this process is the one that writes and says things."""
    return rank() == 0


def is_mine(piece: int) -> bool:
    """Whether piece number `piece` of shared work is this process's."""
    return piece % count() == rank()


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: "torch.device") -> "PartialState":
    """Meets the other processes, if there are any."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def leave() -> None:
    """Parts from the others once all are done: a process that just ends can abort one that still talks to it."""
    torch_distributed = sys.modules.get("torch.distributed")
    if count() > 1 and torch_distributed and torch_distributed.is_initialized():
        torch_distributed.barrier()
        torch_distributed.destroy_process_group()


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, once all processes have come here."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    state.wait_for_everyone()
    value = [make() if state.is_main_process else None]
    out: T = broadcast_object_list(value)[0]
    return out


def gather(mine: Sequence[tuple[int, *tuple[Any, ...]]]) -> list[Any]:
    """All processes' pieces, each a tuple that begins with its number, in the order of these."""
    from accelerate.utils import gather_object

    return sorted(gather_object(list(mine)), key=lambda piece: piece[0])
