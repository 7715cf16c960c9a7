"""Pictures of stock pipelines: from prompts and seeds to latents and pixels."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor

from prunet import __version__
from prunet.console import progress
from prunet.disk.files import new_file
from prunet.disk.seals import verify
from prunet.errors import UserError
from prunet.recipe.prompts import check_prompts
from prunet.recipe.recipe import load_recipe
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import drawing_of
from prunet.sampling.onnx import OnnxFolder
from prunet.sampling.openvino import OpenVinoFolder
from prunet.sampling.runtime_folder import RuntimeFolder
from prunet.sampling.samplers import set_sampler
from prunet.sampling.start import Start, StartPicture, start_from
from prunet.teacher.runtimes import runtime_of
from prunet.teacher.space import check_size
from prunet.teacher.tasks import image_to_image, inpainting
from prunet.teacher.teacher import Teacher, after_overflow
from prunet.words import command

FOLDERS: dict[str | None, type[RuntimeFolder]] = {folder.runtime: folder for folder in (OpenVinoFolder, OnnxFolder)}
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Model:
    """A pipeline to open, with its device and precision.

    `source`: folder, single file, hub id, or run (its student). `config`: for a single file, the folder or hub id with
    configs and tokenizers.
    """

    source: str | Path
    config: str | Path | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Drawing,
    *,
    size: int | None = None,
    batch_size: int = 4,
    start: Start | None = None,
) -> Iterator[Image.Image]:
    """Draws a picture for each prompt from its own seed, so that no picture depends on its batch.

    `start`: what to start from, if not only from noise.
    """
    for first in range(0, len(prompts), batch_size):
        at = slice(first, first + batch_size)
        latents = draw_latents(pipe, prompts[at], seeds[at], how, size=size, start=start and start.rows(at))
        yield from decode(pipe, latents)


def collect(
    pictures: Iterable[Image.Image], prompts: Sequence[str], text: str, save_to: Sequence[Path] = ()
) -> list[Image.Image]:
    """Lists the pictures of `prompts` as they are drawn, with a progress bar called `text`.

    `save_to`: a file for each picture, written as soon as it is drawn.
    """
    out: list[Image.Image] = []
    with progress(text, len(prompts)) as bar:
        for picture in pictures:
            if save_to:
                path = save_to[len(out)]
                with new_file(path) as part:
                    exif = _drawn_by(prompts[len(out)])
                    picture.save(part, format=PICTURE_FORMATS[path.suffix.lower()], exif=exif)
            out.append(picture)
            bar.advance(1)
    return out


@torch.no_grad()
def draw_latents(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Drawing,
    *,
    size: int | None = None,
    start: Start | None = None,
) -> Tensor:
    """Draws the scaled latents (B, 4, h, w) of the pictures, in fp32; each has its own generator, on the CPU.

    With a `start`, the stock pipeline for image to image or inpainting draws them, in the size of the start.

    Raises:
        UserError: there is no such sampler, or the drawn latents are not finite.
    """
    set_sampler(pipe, how.sampler)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # Autocast lets a student in fp32 work with text encoders in half precision.
    device, dtype = pipe.vae.device, next(pipe.text_encoder.parameters()).dtype
    given: dict[str, Any] = {"height": size, "width": size}
    if start is not None:
        pipe, given = (inpainting if start.mask else image_to_image)(pipe), start.inputs(generators)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        result = pipe(
            prompt=list(prompts),
            num_inference_steps=how.steps,
            guidance_scale=how.guidance_scale,
            generator=generators,
            output_type="latent",
            **given,
        )
    latents: Tensor = result.images
    for prompt, seed, row in zip(prompts, seeds, latents, strict=True):
        if not row.isfinite().all():
            raise UserError(
                f"{prompt!r} (seed {seed}): the latents are not finite in {dtype}, so there is no picture: "
                f"{after_overflow(dtype)}"
            )
    return latents.float()


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Decodes scaled latents (B, 4, h, w) to pictures, in the VAE's own precision.

    Raises:
        UserError: the decoded pictures are not finite.
    """
    vae = pipe.vae
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    if not pixels.isfinite().all():
        raise UserError(f"The decoded picture is not finite in {vae.dtype}: {after_overflow(vae.dtype)}")
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels.float(), output_type="pil")
    return pictures


def open_model(model: str | Path | Model, *, only_draw: bool = False) -> Teacher:
    """Opens a pipeline; if only its source is given, on the CPU in full precision. `only_draw`: see `Teacher`.

    Raises:
        UserError: there is nothing to open, or a run has not exported its student yet.
    """
    given = model if isinstance(model, Model) else Model(model)
    source = given.source
    if (Path(source) / "recipe.yaml").is_file():
        if not (Path(source) / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{source}: this run has no pipeline yet: finish it with {command('run', source)}")
        source = Path(source) / "pipeline"
        verify(source, f"delete {source} and run {source.parent} again")
    return Teacher(source, config=given.config, device=given.device, dtype=given.dtype, only_draw=only_draw)


def open_any(model: Model) -> Teacher | RuntimeFolder:
    """Opens a pipeline, or a folder for another runtime.

    Raises:
        UserError: nothing to open there, or a runtime that is not installed.
    """
    folder = FOLDERS.get(runtime_of(model.source))
    if folder is None:
        return open_model(model, only_draw=True)
    if model.config is not None:
        raise UserError(f"{model.source}: a pipeline for {folder.runtime} draws without config: leave it out")
    return folder(model.source)


def generate(
    model: str | Path | Model,
    prompt: str | Sequence[str],
    *,
    num_images: int = 1,
    drawing: Drawing | None = None,
    start: StartPicture | None = None,
    seed: int = 0,
    size: int | None = None,
    save_to: Sequence[Path] = (),
) -> list[Image.Image]:
    """Draws `num_images` pictures of each prompt; the first uses `seed`, and each next one a seed larger by one.

    `model`: a pipeline (`Model`), or only its source; or a folder for another runtime, which draws on the CPU with its
    own sampler. `drawing`: settings that override those of the pipeline, or else 25 steps of dpmsolver++ with guidance
    7.5 (for a run, its recipe's value). `start`: a picture to start from. `save_to`: a file for each picture (.png,
    .jpg, .jpeg or .webp), written as soon as the picture is drawn.
    """
    opening = model if isinstance(model, Model) else Model(model)
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [p for p in given for _ in range(num_images)]
    seeds, text = [seed + i for i in range(len(prompts))], "Drawing" if len(prompts) > 1 else ""
    teacher = open_any(opening)
    if size is not None:
        check_size(teacher, size, "size")
    if isinstance(teacher, RuntimeFolder):
        if start is not None:
            raise UserError(f"{opening.source}: a pipeline for {teacher.runtime} draws without image: leave it out")
        check_prompts(given, "prompt")
        how, pipe = teacher.drawing_of(drawing), teacher.pipeline(opening.dtype)
        return collect(pipe.draw(prompts, seeds, how, size), prompts, text, save_to)
    how = drawing_of(teacher, _usual(Path(opening.source)), drawing)
    teacher.check_prompts(given)
    size, begin = size or teacher.native_size, None
    if start is not None:
        pictures, strength, mask = [start.picture], start.strength, start.mask
        begin = start_from(teacher, pictures, size=size, steps=how.steps, strength=strength, mask=mask)
    drawn = draw(teacher.pipeline(), prompts, seeds, how, size=size, start=begin)
    return collect(drawn, prompts, text, save_to)


def _usual(model: Path) -> Drawing:
    """Returns how to draw with a pipeline without its own settings; a run has the guidance of its recipe."""
    recipe = model / "recipe.yaml"
    return Drawing(guidance_scale=load_recipe(recipe).evaluation.guidance_scale) if recipe.is_file() else Drawing()


def _drawn_by(prompt: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"prunet {__version__}"
    exif[ExifTags.Base.ImageDescription] = _described(prompt)
    return exif


def _described(prompt: str) -> str:
    """Returns the prompt in ASCII, which this tag requires, cut to fit into the 64 kB that a JPEG allows."""
    return json.dumps(prompt)[:10_000]


def is_drawn(path: Path, prompt: str | None = None) -> bool:
    """Returns whether a file is a picture that `draw` wrote, and if `prompt` is given, a picture of this prompt."""
    try:
        with Image.open(path, formats=tuple(set(PICTURE_FORMATS.values()))) as picture:
            exif = picture.getexif()
    except Exception:  # Pillow raises errors of many kinds for other files
        return False
    ours = str(exif.get(ExifTags.Base.Software)).startswith("prunet ")
    return ours and (prompt is None or exif.get(ExifTags.Base.ImageDescription) == _described(prompt))
