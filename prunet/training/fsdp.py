"""A student divided among processes by PyTorch's FSDP2: each process has a piece of every weight, gradient and moment.

On one device nothing changes: `local`, `whole` and `piece` return a plain tensor unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from prunet import processes
from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.known import architecture_of


def shard(net: Net, device: torch.device) -> None:
    """Divides the parameters of `net` among processes, in place. They are sent in fp32, so rounding does not change.

    The weights of a block are gathered together: a block is small enough to be dropped again, and large enough to be
    worth a message.
    """
    blocks = architecture_of(config_of(net)).blocks
    mesh = init_device_mesh(device.type, (processes.count(),))
    for module in net.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    # Even the root is released after a forward pass, because a sheet exchanges the weights between two steps.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def unsharded(net: Net) -> Net:
    """Returns the model in one piece, on the CPU of every process."""
    with torch.device("meta"):
        out: Any = architecture_of(config_of(net)).make(dict(net.config))
        for name, lora in getattr(net, "peft_config", {}).items():
            out.add_adapter(lora, name)
    out.load_state_dict({name: whole(value.detach()).cpu() for name, value in net.state_dict().items()}, assign=True)
    return out


def local(parameter: nn.Parameter) -> Tensor:
    """Returns this process's piece of a tensor, in the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    mine: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return mine.requires_grad_(parameter.requires_grad)


def whole(value: Any, like: Tensor | None = None) -> Any:
    """Gathers a whole tensor from all processes. `like`: the parameter that the piece `value` belongs to."""
    if like is not None and isinstance(like, DTensor) and not isinstance(value, DTensor):
        value = value.to(like.device)
        value = DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return value.full_tensor() if isinstance(value, DTensor) else value


def piece(value: Any, like: Tensor) -> Any:
    """Returns this process's piece of a whole tensor that belongs to the parameter `like`."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
