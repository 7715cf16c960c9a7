"""A pipeline as a folder for OpenVINO; openvino_genai's `Text2ImagePipeline` draws with it, without torch."""

import math
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image

from prunet.console import progress, quiet_libraries
from prunet.disk.files import new_folder
from prunet.exports import int8
from prunet.exports.runtime_folder import open_source, write_facts, write_pipeline
from prunet.exports.traced import Part
from prunet.recipe.values import Drawing
from prunet.sampling.openvino import MODEL, SAMPLERS, OpenVinoPipeline, need
from prunet.sampling.pictures import picture_rmse
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
        drawing: how to draw with it; a sampler that openvino_genai lacks (`lcm` for v-prediction) is replaced by DDIM.
        decoder: a folder with an `AutoencoderTiny`, which replaces the pipeline's VAE.
        card: more facts for the README (`openvino.md.j2`).

    Returns the content of `openvino.json`: `bytes` of all models, `psnr` (dB) and `picture` (root mean squared error,
    0 to 1) as means over the compared prompts, `seconds` per picture (median), and with `bits` "int8" the choices of
    `prunet.exports.int8.quantize`.

    Raises:
        UserError: the extra `openvino` is not installed, or the decoder does not fit.
    """
    for package in ("openvino", "openvino_genai", "openvino_tokenizers", *(["nncf"] if bits else [])):
        need(package)
    source, folder = open_source(pipeline, decoder), Path(folder)
    prediction = source.teacher.noise_scheduler.config.prediction_type
    if drawing.sampler not in SAMPLERS or (drawing.sampler, prediction) == ("lcm", "v_prediction"):  # that one crashes
        drawing = drawing.model_copy(update={"sampler": "ddim"})
    with new_folder(folder, what) as part:
        write_pipeline(source, part, drawing, _write)
        _write_tokenizers(source.teacher, part)
        compared = prompts[PROMPTS : 2 * PROMPTS] or prompts[:PROMPTS]
        with TemporaryDirectory(dir=part) as before:  # on the disk that has room; a killed export leaves nothing
            if bits:
                shutil.copytree(part, before, dirs_exist_ok=True, ignore=shutil.ignore_patterns(Path(before).name))
            chosen = _quantize(source.teacher, part, bits, prompts[:PROMPTS], drawing) if bits else {}
            exact = OpenVinoPipeline(before if bits else part, "f32")
            size = sum(path.stat().st_size for path in part.glob("*/openvino_model.bin"))
            facts = {**_compare(exact, OpenVinoPipeline(part), compared), **chosen, "bits": bits, "bytes": size}
        return write_facts(source, part, "openvino", facts, drawing, {**(card or {}), "prompt": compared[0]})


def _write(part: Part, folder: Path) -> None:
    """Writes a model with 16-bit weights."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about checks of shapes, which hold for all sizes
        shapes = [[-1 if isinstance(dim, str) else dim for dim in shape] for shape in part.inputs.values()]
        model = need("openvino").convert_model(part.model, example_input=part.example, input=shapes)
    for port, name in zip((*model.inputs, *model.outputs), (*part.inputs, *part.outputs), strict=True):
        port.get_tensor().set_names({name})
    need("openvino").save_model(model, folder / MODEL)


def _write_tokenizers(teacher: Teacher, folder: Path) -> None:
    for name in teacher.text_encoders:
        tokenizer: Any = teacher.text_part(name := name.replace("text_encoder", "tokenizer"))
        length = tokenizer.model_max_length
        how = {"with_detokenizer": False, "max_length": length, "use_max_padding": True}
        model = need("openvino_tokenizers").convert_tokenizer(tokenizer, **how)
        need("openvino").save_model(model, folder / name / "openvino_tokenizer.xml")


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
