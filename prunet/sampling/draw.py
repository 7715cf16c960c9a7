"""Pictures of stock pipelines: from prompts and seeds to latents and pixels."""

import json
from collections.abc import Iterable, Iterator, Sequence
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
from prunet.sampling.openvino import OpenVinoPipeline, is_openvino
from prunet.sampling.samplers import SAMPLERS, set_sampler
from prunet.sampling.start import Start, start_from
from prunet.teacher.space import check_size
from prunet.teacher.tasks import image_to_image, inpainting
from prunet.teacher.teacher import Teacher, after_overflow
from prunet.words import command

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


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

    `start`: what to start from, if not from noise alone.
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

    With a `start` the stock pipeline for image to image draws them, or that for inpainting, in the size of the start.

    Raises:
        UserError: no such sampler, or what the denoiser drew is not finite.
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
                f"{prompt!r} (seed {seed}): what the U-Net drew is not finite in {dtype}, so it is no picture: "
                f"{after_overflow(dtype)}"
            )
    return latents.float()


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """Decodes scaled latents (B, 4, h, w) to pictures, in the VAE's own precision.

    Raises:
        UserError: what the VAE decoded is not finite.
    """
    vae = pipe.vae
    pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    if not pixels.isfinite().all():
        raise UserError(f"What the VAE decoded is not finite in {vae.dtype}: {after_overflow(vae.dtype)}")
    pictures: list[Image.Image] = pipe.image_processor.postprocess(pixels.float(), output_type="pil")
    return pictures


def open_model(
    model: str | Path,
    *,
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """Opens the pipeline at `model`: a folder, single file, hub id, or run (its student).

    Raises:
        UserError: nothing to open there, or a run that has not exported its student yet.
    """
    if (Path(model) / "recipe.yaml").is_file():
        if not (Path(model) / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{model}: this run has no pipeline yet: finish it with {command('run', model)}")
        model = Path(model) / "pipeline"
        verify(model, f"delete {model} and run {model.parent} again")
    return Teacher(model, config=config, device=device, dtype=dtype)


def generate(
    model: str | Path,
    prompt: str | Sequence[str],
    *,
    num_images: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    size: int | None = None,
    sampler: str | None = None,
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    save_to: Sequence[Path] = (),
    image: Image.Image | None = None,
    strength: float | None = None,
    mask: Image.Image | None = None,
) -> list[Image.Image]:
    """Draws `num_images` pictures of each prompt with the pipeline at `model` (folder, single file, hub id, run, or a
    folder for OpenVINO, which draws on the CPU and with its own sampler).

    `steps`, `guidance_scale`, `sampler`: by default what the pipeline was made for, else 25, 7.5 (for a run, its
    recipe's value) and dpmsolver++. `save_to`: a file for each picture (.png, .jpg, .jpeg or .webp), written as soon as
    it is drawn.

    `image`: a picture to start from; `strength`: how much of it changes, 0.6 by default; `mask`: draws only where it is
    white, with strength 1 by default (`Start`).
    """
    if image is None and (strength, mask) != (None, None):
        raise UserError(f"{'mask' if strength is None else 'strength'}: is for a picture to start from: give image too")
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"No sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [p for p in given for _ in range(num_images)]
    seeds, text = [seed + i for i in range(len(prompts))], "Drawing" if len(prompts) > 1 else ""
    if is_openvino(model):
        if config is not None or image is not None:
            extra = "image" if config is None else "config"
            raise UserError(f"{model}: a pipeline for OpenVINO draws without {extra}: leave it out")
        check_prompts(given, "prompt")
        pipe = OpenVinoPipeline(model, "f32" if dtype == torch.float32 else "bf16")
        how = pipe.drawing_of(steps=steps, guidance_scale=guidance_scale, sampler=sampler)
        return collect(pipe.draw(prompts, seeds, how, size), prompts, text, save_to)
    teacher = open_model(model, config=config, device=device, dtype=dtype)
    if size is not None:
        check_size(teacher, size, "size")
    teacher.check_prompts(given)
    how = drawing_of(teacher, _usual(Path(model)), steps=steps, guidance_scale=guidance_scale, sampler=sampler)
    size, start = size or teacher.native_size, None
    if image is not None:
        start = start_from(teacher, [image], size=size, steps=how.steps, strength=strength, mask=mask)
    pictures = draw(teacher.pipeline(), prompts, seeds, how, size=size, start=start)
    return collect(pictures, prompts, text, save_to)


def _usual(model: Path) -> Drawing:
    """Returns how to draw with a pipeline that says nothing itself; a run's has the guidance of its recipe."""
    recipe = model / "recipe.yaml"
    return Drawing(guidance_scale=load_recipe(recipe).evaluation.guidance_scale) if recipe.is_file() else Drawing()


def _drawn_by(prompt: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"prunet {__version__}"
    exif[ExifTags.Base.ImageDescription] = _described(prompt)
    return exif


def _described(prompt: str) -> str:
    """Returns the prompt in ASCII, all that this tag holds, cut to fit the 64 kB that a JPEG has for it."""
    return json.dumps(prompt)[:10_000]


def is_drawn(path: Path, prompt: str | None = None) -> bool:
    """Returns whether a file is a picture that `draw` wrote, of `prompt` if one is given."""
    try:
        with Image.open(path, formats=tuple(set(PICTURE_FORMATS.values()))) as picture:
            exif = picture.getexif()
    except Exception:  # Pillow raises errors of many kinds for what is no picture
        return False
    ours = str(exif.get(ExifTags.Base.Software)).startswith("prunet ")
    return ours and (prompt is None or exif.get(ExifTags.Base.ImageDescription) == _described(prompt))
