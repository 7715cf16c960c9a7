"""A pipeline as a folder of ONNX models, which ONNX Runtime computes without torch."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from prunet.console import quiet_libraries
from prunet.disk.files import new_folder
from prunet.exports.runtime_folder import open_source, write_facts, write_pipeline
from prunet.exports.traced import Part
from prunet.extras import check_extra, need
from prunet.recipe.values import Drawing
from prunet.sampling.onnx import MODEL, SAMPLERS
from prunet.teacher.teacher import Teacher

OPSET = 18
#: The largest difference from torch that is rounding, as a share of the largest output.
ROUNDING = 1e-3


@quiet_libraries()
def export_onnx(
    pipeline: Path | str,
    folder: Path | str,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    decoder: Path | str | None = None,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a pipeline folder as ONNX, weights in f32, and compares each model in ONNX Runtime with torch.

    Args:
        prompts: the first one is the example of the README.
        drawing: how to draw with it; a sampler that is not of `SAMPLERS` is replaced by DDIM.
        decoder: a folder of an `AutoencoderTiny`, which decodes instead of the pipeline's VAE.
        card: more facts for the README (`onnx.md.j2`).

    Returns what it also writes into `onnx.json`: `bytes` of all models, and `models`: of each its `inputs` (name and
    shape), `outputs`, `bytes`, and `apart`, its largest difference from torch as a share of the largest output.

    Raises:
        UserError: the extra `onnx` is not installed, or the decoder does not fit.
        RuntimeError: ONNX Runtime computes something else than torch; nothing is left behind.
    """
    check_extra("onnx", "--onnx")
    source = open_source(pipeline, decoder)
    if drawing.sampler not in SAMPLERS:
        drawing = drawing.model_copy(update={"sampler": "ddim"})
    with new_folder(Path(folder), "onnx") as part:
        models = write_pipeline(source, part, drawing, _write)
        _write_tokenizers(source.teacher, part)
        facts = {"bytes": sum(model["bytes"] for model in models.values()), "models": models}
        return write_facts(source, part, "onnx", facts, drawing, {**(card or {}), "prompt": prompts[0]})


def _write(part: Part, folder: Path) -> dict[str, Any]:
    """Writes a model, its weights in a file beside it; returns its facts (`export_onnx`)."""
    onnx = need("onnx", "onnx", "--onnx")
    free = {
        name: {at: dim for at, dim in enumerate(shape) if isinstance(dim, str)} for name, shape in part.inputs.items()
    }
    with TemporaryDirectory(dir=folder) as raw, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about checks of shapes, which hold for all sizes
        torch.onnx.export(
            part.model,
            part.example,
            path := Path(raw) / MODEL,  # above 2 GB with a file for each tensor beside it
            input_names=list(part.inputs),
            output_names=part.outputs,
            dynamic_axes=free,
            opset_version=OPSET,
            dynamo=False,  # which takes twenty times as long, and for SDXL's size many minutes
        )
        data = {"save_as_external_data": True, "location": f"{MODEL}.data"}
        onnx.save_model(onnx.load(path), folder / MODEL, **data)
    apart = _apart(part, folder / MODEL)
    if not apart < ROUNDING:
        raise RuntimeError(f"{folder / MODEL}: ONNX Runtime computes something else than torch ({apart:.1g} apart)")
    return {
        "inputs": [f"{name} [{', '.join(map(str, shape))}]" for name, shape in part.inputs.items()],
        "outputs": part.outputs,
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{MODEL}*")),
        "apart": apart,
    }


def _write_tokenizers(teacher: Teacher, folder: Path) -> None:
    """Writes each tokenizer as the package `tokenizers` reads it, with its padding and length."""
    for name in teacher.text_encoders:
        tokenizer: Any = teacher.text_part(name := name.replace("text_encoder", "tokenizer"))
        backend, length = tokenizer.backend_tokenizer, tokenizer.model_max_length
        backend.enable_truncation(length)
        backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        backend.save(str(folder / name / "tokenizer.json"))


@torch.no_grad()
def _apart(part: Part, path: Path) -> float:
    """Returns the largest difference from torch, as a share of the largest output, for inputs of another shape than
    those that it was traced with: one row, twice as wide.
    """
    runtime = need("onnxruntime", "onnx", "--onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [_other(example, shape) for example, shape in zip(part.example, part.inputs.values(), strict=True)]
    given = {name: value.numpy() for name, value in zip(part.inputs, inputs, strict=True)}
    theirs = session.run(part.outputs, given)
    ours = part.model(*inputs)
    pairs = zip([ours] if isinstance(ours, Tensor) else ours, theirs, strict=True)
    return max(float((a - torch.from_numpy(b)).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)


def _other(example: Tensor, shape: Sequence[int | str]) -> Tensor:
    """Makes random inputs with one row, and twice as wide as `example` where that may be."""
    sides = {"batch": 1, "width": 2 * example.shape[-1]}
    size = [sides.get(str(dim), old) for dim, old in zip(shape, example.shape, strict=True)]
    if example.is_floating_point():
        return torch.randn(size, generator=torch.Generator().manual_seed(0))
    return torch.ones(size, dtype=example.dtype)
