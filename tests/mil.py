"""Computes a Core ML package with torch, operation by operation, because only macOS can run one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = {"fp16": torch.float16, "fp32": torch.float32}
TYPES = FLOATS | {"int32": torch.int32, "int16": torch.int32, "uint16": torch.int32, "bool": torch.bool}


def compute(package: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the outputs of a package. Each operation computes in 32 bits, and rounds to the type of its output."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil.types import builtin_to_string
    from coremltools.models import MLModel

    model = MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    values: dict[str, Any] = dict(given)
    for op in program.operations:
        if op.op_type == "const":
            found = _tensor(op.outputs[0].val)
        elif op.op_type.startswith("constexpr"):  # weights in fewer bits
            found = _tensor(op.materialized_val_inference())
        else:
            found = OPERATIONS[op.op_type](**{name: _read(values, one) for name, one in op.inputs.items()})
        for out, value in zip(op.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            rounds = isinstance(value, Tensor) and value.is_floating_point()
            values[out.name] = value.to(FLOATS[builtin_to_string(out.dtype)]).float() if rounds else value
    return {out.name: values[out.name] for out in program.outputs}


def _tensor(value: Any) -> Any:
    return torch.as_tensor(value) if isinstance(value, np.ndarray | np.generic) else value


def _read(values: dict[str, Any], one: Any) -> Any:
    return [values[x.name] for x in one] if isinstance(one, list | tuple) else values[one.name]


def _conv(x: Tensor, weight: Tensor, strides: Tensor, pad_type: str, pad: Tensor, **more: Any) -> Tensor:
    assert pad_type in ("custom", "valid")
    top, bottom, left, right = pad.tolist() if pad_type == "custom" else [0] * 4
    x, bias = F.pad(x, (left, right, top, bottom)), more.get("bias")
    return F.conv2d(x, weight, bias, strides.tolist(), 0, more["dilations"].tolist(), int(more["groups"]))


def _slice(x: Tensor, begin: Tensor, end: Tensor, **masks: Tensor) -> Tensor:
    first, last = ([False] * x.ndim if (m := masks.get(name)) is None else m for name in ("begin_mask", "end_mask"))
    assert masks.keys() <= {"begin_mask", "end_mask"}
    at = (slice(None if first[i] else int(begin[i]), None if last[i] else int(end[i])) for i in range(x.ndim))
    return x[tuple(at)]


def _layer_norm(x: Tensor, axes: Tensor, epsilon: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    assert axes.tolist() in ([-1], [x.ndim - 1])
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def _gather(x: Tensor, indices: Tensor, axis: Tensor, **_: Any) -> Tensor:
    assert int(axis) == 0
    return x[indices.long()]


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


OPERATIONS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "batch_norm": lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
        x, mean, variance, gamma, beta, eps=float(epsilon)
    ),
    "cast": lambda x, dtype: x.to(TYPES[dtype]),
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "conv": _conv,
    "cos": lambda x: x.cos(),
    "equal": lambda x, y: x == y,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gather_nd": lambda x, indices, **_: x[indices.long().unbind(-1)],
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode]),
    "greater_equal": lambda x, y: x >= y,
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x, transpose_y: (x.mT if transpose_x else x) @ (y.mT if transpose_y else y),
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": lambda x, axis, keep_dims, output_dtype: x.int().argmax(int(axis), bool(keep_dims)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]),
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "sin": lambda x: x.sin(),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": lambda x, split_sizes, axis: x.split(split_sizes.tolist(), int(axis)),
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "stack": lambda values, axis: torch.stack(values, int(axis)),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(float(scale_factor_height), float(scale_factor_width))
    ),
}
