"""The denoiser of a pipeline for OpenVINO in 8 bits, calibrated on its inputs while it draws."""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from prunet.console import progress
from prunet.exports.traced import MORE_INPUTS
from prunet.intervals import Array
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw_latents
from prunet.sampling.openvino import need

Inputs = dict[str, Any]
#: Number of calls of the denoiser for calibration, and of other calls for comparison.
CALIBRATED, COMPARED = 24, 4
#: The share of layers with inputs in 16 bits: the layers that 8 bits change most.
SENSITIVE = 0.05


def captured(pipe: Any, prompts: Sequence[str], how: Drawing, size: int) -> tuple[list[Inputs], list[Inputs]]:
    """Draws `prompts` with a pipeline of torch; returns inputs of its denoiser for calibration and for comparison.

    The inputs are chosen evenly among all calls.
    """
    seen: list[Inputs] = []

    def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sample, timestep = given
        all_named = {**named, **(named.get("added_cond_kwargs") or {})}
        tensors = {"sample": sample, **{name: all_named.get(name) for name in ("encoder_hidden_states", *MORE_INPUTS)}}
        seen.append({name: value.float().numpy().copy() for name, value in tensors.items() if value is not None})
        seen[-1]["timestep"] = timestep.reshape(1).long().numpy()

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with progress("Calibrating", len(prompts)) as bar:
            for seed, prompt in enumerate(prompts):
                draw_latents(pipe, [prompt], [seed], how, size=size)
                bar.advance()
    finally:
        hook.remove()
    chosen = [seen[int(i)] for i in np.linspace(0, len(seen) - 1, min(CALIBRATED + COMPARED, len(seen)))]
    every = max(2, len(chosen) // COMPARED)
    return [x for i, x in enumerate(chosen) if i % every], chosen[::every]


def weights_only(model: Any) -> Any:
    """Stores the weights of `model` in 8 bits; the computation does not change."""
    nncf = _nncf()
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def quantize(model: Any, calibration: Sequence[Inputs], compared: Sequence[Inputs]) -> tuple[Any, dict[str, Any]]:
    """Converts weights and activations of `model` to 8 bits, except the inputs of its most sensitive layers.

    Returns the new model, and what was chosen: `kept` lists the layers with inputs in 16 bits; `error` is the relative
    squared error of the output before and after they were kept.
    """
    nncf = _nncf()
    expected = _outputs(model, compared)
    # Without SmoothQuant: it may lower the error of a call a little, but pictures are farther away (docs/log.md).
    smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth_quant_alphas),
    )
    before = _error(quantized, compared, expected)
    kept = _keep_sensitive(quantized, compared)
    return quantized, {"kept": kept, "error": [before, _error(quantized, compared, expected)]}


def _nncf() -> Any:
    nncf = need("nncf")
    nncf.set_log_level(logging.WARNING)  # otherwise nncf prints a table of the layers that it changed
    return nncf


def _keep_sensitive(model: Any, compared: Sequence[Inputs]) -> list[str]:
    """Keeps 16 bits for the inputs of the first and last layer, and of the share `SENSITIVE` that 8 bits change most.

    Returns the names of these layers.
    """
    layers = {
        re.sub(r"^__module\.unet\.|/.*$", "", op.get_friendly_name()): op
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul") and _before(op).get_type_name() == "FakeQuantize"
    }
    lost = _lost(model, list(layers.values()), compared)
    worst = sorted(layers, key=lambda name: -lost[layers[name].get_friendly_name()])[: round(SENSITIVE * len(layers))]
    kept = [name for name in layers if name in worst or name in ("conv_in", "conv_out")]
    for name in kept:
        layers[name].input(0).replace_source_output(_before(layers[name]).input_value(0))
    return kept


def _lost(model: Any, layers: Sequence[Any], compared: Sequence[Inputs]) -> dict[str, float]:
    """Returns the relative squared error of each layer's input in 8 bits, by the layer's name."""
    watched = model.clone()
    ours = {op.get_friendly_name(): op for op in watched.get_ops()}
    quantized = [_before(ours[layer.get_friendly_name()]) for layer in layers]
    outputs = {op.get_friendly_name(): (op.input_value(0), op.output(0)) for op in quantized}
    watched.add_outputs([output for pair in outputs.values() for output in pair])
    lost = dict.fromkeys(outputs, 0.0)
    for _, *seen in _all_outputs(watched, compared):
        for name, exact, in_8_bits in zip(outputs, seen[::2], seen[1::2], strict=True):
            lost[name] += float(np.square(exact - in_8_bits).sum() / max(np.square(exact).sum(), 1e-12))
    return {
        layer.get_friendly_name(): lost[op.get_friendly_name()] for layer, op in zip(layers, quantized, strict=True)
    }


def _before(op: Any) -> Any:
    """Returns the operation that computes the first input of `op`."""
    return op.input_value(0).get_node()


def _all_outputs(model: Any, inputs: Sequence[Inputs]) -> Iterator[list[Array]]:
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = need("openvino").Core().compile_model(model, "CPU", properties)
    for given in inputs:
        yield list(compiled(given).values())


def _outputs(model: Any, inputs: Sequence[Inputs]) -> list[Array]:
    return [outputs[0].copy() for outputs in _all_outputs(model, inputs)]


def _error(model: Any, inputs: Sequence[Inputs], expected: Sequence[Array]) -> float:
    """Returns the mean relative squared error of the outputs."""
    pairs = zip(_outputs(model, inputs), expected, strict=True)
    return float(np.mean([np.square(ours - theirs).mean() / np.square(theirs).mean() for ours, theirs in pairs]))
