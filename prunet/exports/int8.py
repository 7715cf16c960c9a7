"""The denoiser of a pipeline for OpenVINO in 8 bits, calibrated on what it gets while it draws."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunet.console import progress
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw_latents
from prunet.sampling.openvino import need

Inputs = dict[str, np.ndarray]
#: Calls of the denoiser to calibrate with, and others to compare the results on.
CALIBRATED, COMPARED = 24, 4
#: The share of layers whose inputs stay in 16 bits: those that lose most in 8.
SENSITIVE = 0.1


def captured(pipe: Any, prompts: Sequence[str], how: Drawing, size: int) -> tuple[list[Inputs], list[Inputs]]:
    """Draws `prompts` with a pipeline of torch; returns inputs of its denoiser, evenly chosen among all calls, to
    calibrate with and to compare on.
    """
    seen: list[Inputs] = []

    def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sample, timestep = given
        added = named.get("added_cond_kwargs") or {}
        tensors = {"sample": sample, "encoder_hidden_states": named["encoder_hidden_states"], **added}
        seen.append({name: value.float().numpy().copy() for name, value in tensors.items()})
        seen[-1]["timestep"] = timestep.reshape(1).long().numpy()

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with progress("Calibrating", len(prompts)) as bar:
            for seed, prompt in enumerate(prompts):
                drawn = {"steps": how.steps, "guidance_scale": how.guidance_scale, "size": size}
                draw_latents(pipe, [prompt], [seed], **drawn)
                bar.advance()
    finally:
        hook.remove()
    chosen = [seen[int(i)] for i in np.linspace(0, len(seen) - 1, min(CALIBRATED + COMPARED, len(seen)))]
    every = max(2, len(chosen) // COMPARED)
    return [x for i, x in enumerate(chosen) if i % every], chosen[::every]


def weights_only(model: Any) -> Any:
    """Stores the weights of `model` in 8 bits; it computes as before."""
    nncf = need("nncf")
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def quantize(model: Any, calibration: Sequence[Inputs], compared: Sequence[Inputs]) -> tuple[Any, dict[str, Any]]:
    """Puts weights and activations of `model` in 8 bits, but the inputs of its most sensitive layers.

    Returns the new model and what was chosen: `smooth_quant`, which is off unless it is better, `kept`, the modules
    whose inputs stay in 16 bits, and `error`, the relative squared error of the output before and after that.
    """
    nncf = need("nncf")
    expected = _outputs(model, compared)
    found = {}
    for smooth in (False, True):
        alphas = nncf.AdvancedSmoothQuantParameters() if smooth else nncf.AdvancedSmoothQuantParameters(matmul=-1)
        candidate = nncf.quantize(
            model,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
        )
        found[smooth] = candidate, _error(candidate, compared, expected)
    smooth = found[True][1] < found[False][1]
    chosen, before = found[smooth]
    kept = _keep_sensitive(chosen, compared, expected)
    after = _error(chosen, compared, expected)
    return chosen, {"smooth_quant": smooth, "kept": kept, "error": [before, after]}


def _keep_sensitive(model: Any, compared: Sequence[Inputs], expected: Sequence[np.ndarray]) -> list[str]:
    """Takes the 8 bits from the inputs of the modules without which the error is least, one module after the other,
    until `SENSITIVE` of the layers are reached; returns the modules.
    """
    modules = _quantized(model)
    errors = {}
    with progress("Sensitive layers", len(modules)) as bar:
        for name, layers in modules.items():
            undo = [_bypass(layer) for layer in layers]
            errors[name] = _error(model, compared, expected)
            for layer, quantized in zip(layers, undo, strict=True):
                layer.input(0).replace_source_output(quantized)
            bar.advance()
    left, kept = SENSITIVE * sum(map(len, modules.values())), []
    for name in sorted(modules, key=lambda name: errors[name]):
        if len(modules[name]) <= left:
            left -= len(modules[name])
            kept.append(name)
            for layer in modules[name]:
                _bypass(layer)
    return kept


def _quantized(model: Any) -> dict[str, list[Any]]:
    """Returns the convolutions and matrix products whose input is in 8 bits, by the block's part they belong to."""
    modules = defaultdict(list)
    for op in model.get_ops():
        if op.get_type_name() in ("Convolution", "MatMul") and _source(op).get_type_name() == "FakeQuantize":
            name = re.sub(r"^__module\.unet\.|/.*$", "", op.get_friendly_name())
            part = re.match(r"\w+_blocks?(\.\d+)?(\.(resnets|attentions|\w+samplers)\.\d+)?|\w+", name)
            modules[part[0] if part else name].append(op)
    return dict(modules)


def _source(op: Any) -> Any:
    return op.input_value(0).get_node()


def _bypass(op: Any) -> Any:
    """Connects the first input of `op` to what is before its quantisation; returns the quantised output."""
    quantized = op.input_value(0)
    op.input(0).replace_source_output(quantized.get_node().input_value(0))
    return quantized


def _outputs(model: Any, inputs: Sequence[Inputs]) -> list[np.ndarray]:
    ov = need("openvino")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled(given)[0].copy() for given in inputs]


def _error(model: Any, inputs: Sequence[Inputs], expected: Sequence[np.ndarray]) -> float:
    """Returns the squared error of the outputs over their mean square."""
    pairs = zip(_outputs(model, inputs), expected, strict=True)
    return float(np.mean([np.square(ours - theirs).mean() / np.square(theirs).mean() for ours, theirs in pairs]))
