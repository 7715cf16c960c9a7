"""A pipeline as Core ML packages; Apple's Swift package StableDiffusion reads them once a Mac has compiled them."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prunet.console import progress, quiet_libraries
from prunet.disk.files import new_folder
from prunet.errors import UserError
from prunet.exports.runtime_folder import Source, open_source, write_facts
from prunet.exports.traced import Part, parts
from prunet.extras import check_extra, need
from prunet.recipe.values import Drawing
from prunet.teacher.teacher import Teacher

#: Weights of U-Net and text encoders: in 8 bits, or palettized, 6 bits that choose among 64 values for each tensor.
Bits = Literal["int8-weights", "palettized"]
NAMES = {"unet": "Unet", "text_encoder": "TextEncoder", "text_encoder_2": "TextEncoder2", "vae_decoder": "VAEDecoder"}
#: Tokens that are built into Apple's reader.
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = {"text_encoder": END, "text_encoder_2": "!"}
#: The noise schedule and the prediction type that are built into Apple's reader.
SCHEDULE = {
    "prediction_type": "epsilon",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


@quiet_libraries()
def export_coreml(
    pipeline: Path | str,
    folder: Path | str,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    bits: Bits | None = None,
    decoder: Path | str | None = None,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a pipeline folder as Core ML packages of its native size; only macOS can run them.

    Args:
        prompts: the first one is the example of the README.
        drawing: how to draw with it. Without guidance, the U-Net of SD takes one row, otherwise two.
        bits: how weights are stored; by default in 16 bits.
        decoder: a folder of an `AutoencoderTiny`, which decodes instead of the pipeline's VAE.
        card: more facts for the README (`coreml.md.j2`).

    Returns what it also writes into `coreml.json`: `bytes` of all packages; `models`: of each its `inputs` (name and
    shape), `outputs` and `bytes`; `differs`: what Apple's reader does in another way than diffusers.

    Raises:
        UserError: the extra `coreml` is not installed, the decoder does not fit, or Apple's reader cannot draw with the
            U-Net, the noise schedule or the vocabulary of the pipeline.
    """
    check_extra("coreml", "--coreml")
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # else it warns of each version that it does not know
    source = open_source(pipeline, decoder)
    teacher, models = source.teacher, {}
    _check_reader(teacher)
    with new_folder(Path(folder), "coreml") as part:
        with progress("Converting", 2 + len(teacher.text_encoders)) as bar:
            for name, model in _models(source, drawing):
                bar.advance(0, note=name)
                exact = bits is None or name == "vae_decoder"
                models[NAMES[name]] = _write(model, part / f"{NAMES[name]}.mlpackage", None if exact else bits)
                bar.advance()
        _tokenizer(teacher, "text_encoder").backend_tokenizer.model.save(str(part))  # vocab.json and merges.txt
        facts = {
            "bytes": sum(model["bytes"] for model in models.values()),
            "bits": bits,
            "models": models,
            "differs": _differs(teacher, drawing),
            "scaling_factor": source.vae.config.scaling_factor,
            "is_xl": teacher.kind == "sdxl",
        }
        return write_facts(source, part, "coreml", facts, drawing, {**(card or {}), "prompt": prompts[0]})


def _check_reader(teacher: Teacher) -> None:
    """Refuses a U-Net, a noise schedule or a vocabulary that Apple's reader does not know."""
    if teacher.architecture.takes_guidance(teacher.unet_config):
        raise UserError(
            f"--coreml: the U-Net of {teacher.source} takes the guidance scale as an input, which Apple's reader does "
            "not give it: use another form, such as --onnx"
        )
    schedule = teacher.noise_scheduler.config
    for name, theirs in SCHEDULE.items():
        if (ours := schedule.get(name, theirs)) != theirs:
            raise UserError(
                f"--coreml: {name} of {teacher.source} is {ours}, and Apple's reader knows only {theirs}: use another "
                "form, such as --onnx"
            )
    vocabulary = _tokenizer(teacher, "text_encoder").backend_tokenizer.get_vocab(with_added_tokens=False)
    for token in (START, END):
        if token not in vocabulary:
            raise UserError(
                f"--coreml: the vocabulary of {teacher.source} has no {token}, which Apple's reader adds to each "
                "prompt: use another form, such as --onnx"
            )


def _tokenizer(teacher: Teacher, encoder: str) -> Any:
    return teacher.text_part(encoder.replace("text_encoder", "tokenizer"))


def _differs(teacher: Teacher, drawing: Drawing) -> list[str]:
    """Lists what Apple's reader does with this pipeline in another way than diffusers."""
    found = ["splits prompts only at spaces, so a word with a punctuation mark becomes other tokens"]
    if drawing.sampler not in ("pndm", "dpmsolver++"):
        found.append(f"draws with DPM-Solver++ or PNDM instead of {drawing.sampler}")
    pads = [(name, PADDING[name], _tokenizer(teacher, name).pad_token) for name in teacher.text_encoders]
    found += [
        f"pads the prompts of {name} with {theirs} instead of {ours}" for name, theirs, ours in pads if ours != theirs
    ]
    if drawing.rows > 1 and teacher.zeros_for_empty_prompt:
        found.append("uses the embeddings of the empty prompt for guidance instead of zeros")
    return found


class _Model(NamedTuple):
    """A model as Apple's reader calls it: example inputs, names of outputs, and the types of inputs and computation."""

    model: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    given_in: Any = np.float16
    computes_in: Any = np.float16


class _Unet(nn.Module):
    """The U-Net with `encoder_hidden_states` as (B, width, 1, tokens)."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.model = part.model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *added: Tensor) -> Tensor:
        out: Tensor = self.model(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2), *added)
        return out


class _TextEncoder(nn.Module):
    """A text encoder with tokens as floats. `chosen`: indices of the outputs that it returns."""

    def __init__(self, part: Part, chosen: Sequence[int]) -> None:
        super().__init__()
        self.model, self.chosen = part.model, chosen

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids.to(torch.int32))
        return tuple(found[at] for at in self.chosen)


def _models(source: Source, drawing: Drawing) -> Iterator[tuple[str, _Model]]:
    """Yields the models with the names, shapes and types that Apple's reader gives and expects."""
    teacher, is_xl = source.teacher, source.teacher.kind == "sdxl"
    latents = teacher.architecture.native_latent_size(teacher.unet_config)
    rows = 2 if is_xl else drawing.rows  # the reader calls SDXL's U-Net with two rows, guided or not
    for name, part in parts(*source):
        first, channels = part.example[0], part.example[0].shape[1]
        if name == "unet":
            _, _, context, *added = part.example
            length = _tokenizer(teacher, "text_encoder").model_max_length
            inputs = {
                "sample": torch.zeros(rows, channels, *latents),
                "timestep": torch.ones(rows),
                "encoder_hidden_states": torch.zeros(rows, context.shape[-1], 1, length),
                **dict(zip(list(part.inputs)[3:], added, strict=True)),
            }
            yield name, _Model(_Unet(part), inputs, ["noise_pred"])
        elif name == "vae_decoder":
            exact = np.float32 if is_xl else np.float16  # the VAE of SDXL overflows in 16 bits
            z = torch.zeros(1, channels, *latents)
            yield name, _Model(part.model, {"z": z}, ["image"], exact, exact)
        else:
            # The second to last layer of SDXL's encoders, and what is pooled: the first output of the second encoder.
            chosen = (-2, 0 if name.endswith("_2") else 1) if is_xl else (0, 1)
            outputs = ["hidden_embeds" if is_xl else "last_hidden_state", "pooled_outputs"]
            yield name, _Model(_TextEncoder(part, chosen), {"input_ids": first[:1].float()}, outputs, np.float32)


def _write(model: _Model, package: Path, bits: Bits | None) -> dict[str, Any]:
    """Writes a model as a package; returns its facts (`export_coreml`)."""
    converted = _convert(model)
    if bits:
        converted = _compress(converted, bits)
    converted.save(str(package))
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for a debugger of another runtime
    described = converted.get_spec().description
    return {
        "inputs": [f"{one.name} {list(one.type.multiArrayType.shape)}" for one in described.input],
        "outputs": [one.name for one in described.output],
        "bytes": sum(path.stat().st_size for path in package.rglob("*") if path.is_file()),
    }


def _convert(model: _Model) -> Any:
    """Converts a model by torch.export, because coremltools cannot convert a trace of a U-Net without a mid block."""
    ct = need("coremltools", "coreml", "--coreml")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model.model.eval(), tuple(model.inputs.values()), strict=False)
        exported = exported.run_decompositions({})
        graph = exported.graph_module.graph
        for node in list(graph.nodes):  # these do nothing, and coremltools does not know them
            if node.target in (torch.ops.aten.alias.default, torch.ops.aten.lift_fresh_copy.default):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        exported.graph_module.recompile()
        return ct.convert(
            exported,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            inputs=[ct.TensorType(name, tuple(x.shape), dtype=model.given_in) for name, x in model.inputs.items()],
            outputs=[ct.TensorType(name, dtype=model.given_in) for name in model.outputs],
            compute_precision=ct.precision.FLOAT16 if model.computes_in is np.float16 else ct.precision.FLOAT32,
            skip_model_load=True,
        )


def _compress(converted: Any, bits: Bits) -> Any:
    """Stores the weights of a converted model as `bits` says."""
    coreml = need("coremltools.optimize.coreml", "coreml", "--coreml")
    if bits == "palettized":
        palettes = coreml.OpPalettizerConfig(mode="kmeans", nbits=6)
        return coreml.palettize_weights(converted, coreml.OptimizationConfig(global_config=palettes))
    linear = coreml.OpLinearQuantizerConfig(mode="linear_symmetric")
    return coreml.linear_quantize_weights(converted, coreml.OptimizationConfig(global_config=linear))
