"""A pipeline as a folder for OpenVINO; openvino_genai's `Text2ImagePipeline` draws with it, without torch."""

import json
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from prunet.console import progress, quiet_libraries
from prunet.denoisers.freeze import freeze
from prunet.disk.files import new_folder, write_json
from prunet.disk.seals import verify
from prunet.errors import UserError
from prunet.exports import int8
from prunet.exports.card import model_card
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import write_made_for
from prunet.sampling.openvino import MODEL, SAMPLERS, OpenVinoPipeline, need
from prunet.sampling.pictures import picture_rmse
from prunet.teacher.configs import read_object
from prunet.teacher.teacher import Teacher

#: What is in 8 bits: weights and activations of the denoiser, or only weights; for text encoders always only weights.
Bits = Literal["int8", "int8-weights"]
#: Number of prompts for calibration, and of other prompts for comparison.
PROMPTS = 4


@quiet_libraries()
def export_openvino(
    pipeline: Path | str,
    folder: Path | str,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    bits: Bits | None = None,
    decoder: Path | str | None = None,
    card: dict[str, Any] | None = None,
    what: str = "openvino",
) -> dict[str, Any]:
    """Writes a pipeline folder for OpenVINO, and compares its pictures with those of 16-bit weights in f32.

    Args:
        prompts: the first `PROMPTS` calibrate 8 bits, the next ones are drawn for comparison.
            drawing: how to draw with it; a sampler that openvino_genai lacks is replaced by DDIM.
            decoder: a folder with an `AutoencoderTiny`, which replaces the pipeline's VAE.
            card: more facts for the README (`openvino.md.j2`).

        Returns the content of `openvino.json`: `bytes` of all models, `psnr` (dB) and `picture` (root mean squared
        error, 0 to 1) as means over the compared prompts, `seconds` per picture (median), and with `bits` "int8" the
        choices of `prunet.exports.int8.quantize`.

        Raises:
            UserError: the extra `openvino` is not installed, or the decoder does not fit.
    """
    for package in ("openvino", "openvino_genai", "openvino_tokenizers", *(["nncf"] if bits else [])):
        need(package)
    verify(Path(pipeline), f"delete {pipeline} and export it again")
    teacher, folder = Teacher(pipeline), Path(folder)
    vae = open_decoder(decoder, teacher) if decoder else teacher.vae
    if drawing.sampler not in SAMPLERS:
        drawing = drawing.model_copy(update={"sampler": "ddim"})
    with new_folder(folder, what) as part:
        _write(teacher, vae, part, drawing)
        compared = prompts[PROMPTS : 2 * PROMPTS] or prompts[:PROMPTS]
        with TemporaryDirectory() as before:
            if bits:
                shutil.copytree(part, before, dirs_exist_ok=True)
            chosen = _quantize(teacher, part, bits, prompts[:PROMPTS], drawing) if bits else {}
            exact = OpenVinoPipeline(before if bits else part, "f32")
            facts = {**_compare(exact, OpenVinoPipeline(part), compared), **chosen}
        form = {"bits": bits, "decoder": type(vae).__name__, "size": teacher.native_size}
        facts |= form | {"bytes": _bytes(part), "made_for": drawing.model_dump()}
        write_json(part / "openvino.json", facts)
        about: dict[str, Any] = {
            **(card or {}),
            **facts,
            "drawing": drawing,
            "prompt": compared[0],
            "template": "openvino.md.j2",
        }
        (part / "README.md").write_text(model_card(about), encoding="utf-8")
    return facts


def _write(teacher: Teacher, vae: Any, folder: Path, drawing: Drawing) -> None:
    """Writes the pipeline with 16-bit weights."""
    ov, tokenizers = need("openvino"), need("openvino_tokenizers")
    configs, names = teacher.configs(), [name.replace("text_encoder", "tokenizer") for name in teacher.text_encoders]
    for name in (*names, "scheduler"):
        shutil.copytree(configs / name, folder / name)
    shutil.copyfile(configs / "model_index.json", folder / "model_index.json")
    write_made_for(folder, drawing)
    with progress("Converting", 2 + len(names)) as bar:
        for name, part in _parts(teacher, vae):
            bar.advance(0, note=name)
            (folder / name).mkdir()
            ov.save_model(_convert(part), folder / name / MODEL)
            (folder / name / "config.json").write_text(json.dumps(part.config, indent=2, default=str) + "\n")
            bar.advance()
    for name in names:
        tokenizer: Any = teacher.text_part(name)
        length = tokenizer.model_max_length
        model = tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False, max_length=length, use_max_padding=True)
        ov.save_model(model, folder / name / "openvino_tokenizer.xml")


def _quantize(teacher: Teacher, folder: Path, bits: Bits, prompts: Sequence[str], drawing: Drawing) -> dict[str, Any]:
    """Converts the denoiser in `folder` to 8 bits, and the weights of the text encoders; returns what was chosen."""
    core = need("openvino").Core()
    chosen: dict[str, Any] = {}
    for name in ("unet", *teacher.text_encoders):
        model = core.read_model(path := folder / name / MODEL)
        if name == "unet" and bits == "int8":
            inputs = int8.captured(teacher.pipeline(), prompts, drawing, teacher.native_size)
            model, chosen = int8.quantize(model, *inputs)
        else:
            model = int8.weights_only(model)
        need("openvino").save_model(model, aside := path.with_name("new.xml"))
        del model  # the model still reads from the file that is replaced
        for suffix in (".xml", ".bin"):
            aside.with_suffix(suffix).replace(path.with_suffix(suffix))
    return chosen


def _compare(exact: OpenVinoPipeline, ours: OpenVinoPipeline, prompts: Sequence[str]) -> dict[str, Any]:
    errors, seconds = [], []
    with progress("Comparing", len(prompts)) as bar:
        for seed, prompt in enumerate(prompts):
            pictures: list[Image.Image] = []
            for pipe in (exact, ours):
                began = time.perf_counter()
                pictures += pipe.draw([prompt], [seed], pipe.made_for)
            seconds.append(time.perf_counter() - began)
            errors.append(picture_rmse(*pictures))
            bar.advance()
    psnr = [-20 * math.log10(max(error, 1e-5)) for error in errors]
    return {
        "prompts": len(prompts),
        "psnr": statistics.mean(psnr),
        "picture": statistics.mean(errors),
        "seconds": statistics.median(seconds),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/openvino_model.bin"))


def open_decoder(folder: Path | str, teacher: Teacher) -> Any:
    """Opens a small decoder for a teacher's latents: a folder with diffusers' `AutoencoderTiny`, such as TAESD.

    Raises:
        UserError: the folder has no such model, or the model is for other latents.
    """
    from diffusers import AutoencoderTiny

    config = read_object(Path(folder) / "config.json", f"{folder} is not a decoder")
    if config.get("_class_name") != AutoencoderTiny.__name__:
        raise UserError(f"{folder}: a {config.get('_class_name')}: give an AutoencoderTiny")
    try:
        vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # any kind of error, since diffusers does not check the values
        raise UserError(f"{folder}: diffusers cannot open this AutoencoderTiny ({error}): fetch or copy it") from error
    theirs = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    ours = teacher.part_config("vae").get("latent_channels", 4), teacher.vae_scale
    if theirs != ours:
        shown = ("{} channels of 1/{} of the side".format(*pair) for pair in (theirs, ours))
        raise UserError(f"{folder}: for latents of {next(shown)}, those of {teacher.source} have {next(shown)}")
    return freeze(vae)


# -- the parts, for tracing


class Part(NamedTuple):
    """A model of the pipeline for tracing, with example inputs, and the name and shape (-1: any) of each input."""

    model: nn.Module
    example: tuple[Tensor, ...]
    inputs: list[tuple[str, list[int]]]
    outputs: list[str]
    config: dict[str, Any]


class _Denoiser(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        out: Tensor = self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]
        return out


class _TextEncoder(nn.Module):
    """A text encoder. `hidden`: also returns the output of each layer; SDXL uses the second to last."""

    def __init__(self, encoder: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        first, second, *more = self.encoder(input_ids, output_hidden_states=self.hidden, return_dict=False)
        return (first, second, *more[0]) if self.hidden else (first, second)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return out


def _parts(teacher: Teacher, vae: Any) -> Iterator[tuple[str, Part]]:
    """Yields each model by the name of its folder."""
    yield "unet", _denoiser(teacher)
    for name in teacher.text_encoders:
        yield name, _text_encoder(teacher, name)
    channels = vae.config.latent_channels
    # Small latents, because only their number of channels matters, and tracing takes as long as drawing.
    example, shape = torch.zeros(1, channels, 4, 4), [-1, channels, -1, -1]
    yield "vae_decoder", Part(_Decoder(vae), (example,), [("latent_sample", shape)], ["sample"], dict(vae.config))


def _denoiser(teacher: Teacher) -> Part:
    config = teacher.unet_config
    side = teacher.architecture.side_step(config)
    example = teacher.architecture.example_inputs(config, 2, latent_size=(side, side))
    context, added = example["encoder_hidden_states"], example.get("added_cond_kwargs") or {}
    names = [name for name in ("text_embeds", "time_ids") if name in added]
    inputs = [
        ("sample", [-1, config["in_channels"], -1, -1]),
        ("timestep", [-1]),  # openvino_genai refuses fractional timesteps
        ("encoder_hidden_states", [-1, -1, context.shape[-1]]),
        *((name, [-1, added[name].shape[1]]) for name in names),
    ]
    given = (example["sample"], torch.ones(1, dtype=torch.int64), context, *(added[name] for name in names))
    return Part(_Denoiser(teacher.unet), given, inputs, ["out_sample"], config)


def _text_encoder(teacher: Teacher, name: str) -> Part:
    encoder: Any = teacher.text_part(name)
    tokenizer: Any = teacher.text_part(name.replace("text_encoder", "tokenizer"))
    length, config, hidden = tokenizer.model_max_length, encoder.config, teacher.kind == "sdxl"
    outputs = ["text_embeds", "last_hidden_state"] if name.endswith("_2") else ["last_hidden_state", "pooler_output"]
    if hidden:
        outputs += [f"hidden_states.{i}" for i in range(config.num_hidden_layers + 1)]
    example = (torch.zeros(1, length, dtype=torch.int64),)
    return Part(_TextEncoder(encoder, hidden), example, [("input_ids", [-1, length])], outputs, config.to_dict())


def _convert(part: Part) -> Any:
    """Converts a part to a model of OpenVINO."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about checks of shapes, which hold for all sizes
        model = need("openvino").convert_model(part.model.eval(), example_input=part.example, input=part.inputs)
    for output, name in zip(model.outputs, part.outputs, strict=True):
        output.get_tensor().set_names({name})
    return model
