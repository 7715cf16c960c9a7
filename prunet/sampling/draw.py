"""Pictures of stock pipelines: from prompts and seeds to latents and pixels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import ExifTags, Image
from torch import Tensor

from prunet import __version__
from prunet.console import progress
from prunet.disk.files import new_file
from prunet.disk.seals import verify
from prunet.errors import UserError
from prunet.teacher.space import check_size
from prunet.teacher.teacher import Teacher, after_overflow

SAMPLERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}


# As Stable Diffusion ships them. Where another sampler's config does not say, diffusers' defaults would clip latents to
# [-1, 1] (DDIM), and warm up over more steps than may be asked for (PNDM).
SAMPLER_OPTIONS = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def set_sampler(pipe: Any, name: str | None) -> Any:
    """Puts the named sampler in place of the pipeline's own, with the same noise schedule.

    Raises:
        UserError: no sampler of that name.
    """
    if name is None:
        return pipe
    if name not in SAMPLERS:
        raise UserError(f"No sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    pipe.scheduler = SAMPLERS[name].from_config(pipe.scheduler.config, **SAMPLER_OPTIONS.get(name, {}))
    return pipe


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    size: int | None = None,
    batch_size: int = 4,
    text: str | None = None,
    save_to: Sequence[Path] = (),
) -> list[Image.Image]:
    """A picture for each prompt, from its own seed, so that no picture depends on the batch it was in.

    `text`: shows a progress bar under this name. `save_to`: a file for each picture, written as soon as it is drawn.
    """
    out: list[Image.Image] = []
    with progress(text or "", len(prompts) if text else None) as bar:
        for start in range(0, len(prompts), batch_size):
            at = slice(start, start + batch_size)
            latents = draw_latents(pipe, prompts[at], seeds[at], steps=steps, guidance_scale=guidance_scale, size=size)
            pictures = decode(pipe, latents)
            for path, picture, prompt in zip(save_to[at], pictures, prompts[at], strict=bool(save_to)):
                with new_file(path) as part:
                    picture.save(part, format=PICTURE_FORMATS[path.suffix.lower()], exif=_drawn_by(prompt))
            out += pictures
            bar.advance(len(pictures))
    return out


@torch.no_grad()
def draw_latents(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    size: int | None = None,
) -> Tensor:
    """The latents (B, 4, h, w) of the pictures, scaled; one generator on the CPU a picture, whatever the device.

    Raises:
        UserError: what the denoiser drew is not finite.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # Under autocast, so that a student in fp32 may stand beside text encoders in half precision.
    device, dtype = pipe.vae.device, next(pipe.text_encoder.parameters()).dtype
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        result = pipe(
            prompt=list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=size,
            width=size,
            generator=generators,
            output_type="latent",
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
    """Pictures of scaled latents (B, 4, h, w), decoded in the VAE's own precision.

    Raises:
        UserError: what the VAE made of them is not finite.
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
    """The pipeline at `model`: folder, single file, hub id, or the student of a run.

    Raises:
        UserError: nothing to open there, or a run that has not exported its student yet.
    """
    if (Path(model) / "recipe.yaml").is_file():
        if not (Path(model) / "pipeline" / "model_index.json").is_file():
            raise UserError(f"{model}: a run without its pipeline yet: finish it with `prunet run {model}`")
        model = Path(model) / "pipeline"
        verify(model, f"delete {model} and run {model.parent} again")
    return Teacher(model, config=config, device=device, dtype=dtype)


def generate(
    model: str | Path,
    prompt: str | Sequence[str],
    *,
    num_images: int = 1,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    size: int | None = None,
    sampler: str | None = "dpmsolver++",
    config: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    save_to: Sequence[Path] = (),
) -> list[Image.Image]:
    """Draws `num_images` pictures of each prompt with the pipeline at `model` (folder, single file, hub id or run).

    `save_to`: a file for each picture (.png, .jpg, .jpeg or .webp), written as soon as it is drawn.
    """
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"No sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    teacher = open_model(model, config=config, device=device, dtype=dtype)
    if size is not None:
        check_size(teacher, size, "size")
    teacher.check_prompts([prompt] if isinstance(prompt, str) else prompt)
    pipe = set_sampler(teacher.pipeline(), sampler)
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
    seeds = [seed + i for i in range(len(prompts))]
    return draw(
        pipe,
        prompts,
        seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        size=size or teacher.native_size,
        text="Drawing" if len(prompts) > 1 else None,
        save_to=save_to,
    )


def check_sampler(teacher: Teacher, name: str, steps: int, where: str) -> None:
    """Refuses a sampler that there is not, or that the teacher's schedule cannot drive for `steps` steps.

    `where`: the part of the recipe that asks for it.
    """
    if name not in SAMPLERS:
        raise UserError(f"{where}.sampler: no sampler {name!r}: {', '.join(SAMPLERS)}")
    config = teacher.part_config("scheduler")
    if steps > (most := teacher.noise_scheduler.config.num_train_timesteps):
        raise UserError(f"{where}.steps: {steps} are more than the {most} timesteps of {teacher.source}")
    try:
        SAMPLERS[name].from_config(config, **SAMPLER_OPTIONS.get(name, {})).set_timesteps(steps)
    except Exception as error:  # of any kind: diffusers takes the values as they are
        raise UserError(
            f"{teacher.source}: its scheduler/scheduler_config.json drives no {name} for {steps} steps: {error}"
        ) from error


def _drawn_by(prompt: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"prunet {__version__}"
    exif[ExifTags.Base.ImageDescription] = _described(prompt)
    return exif


def _described(prompt: str) -> str:
    """In ASCII, which is all that this tag holds, and in the 64 kB that a JPEG has for it."""
    return json.dumps(prompt)[:10_000]


def is_drawn(path: Path, prompt: str | None = None) -> bool:
    """Whether a file is a picture that `draw` wrote; of this prompt, if one is given."""
    try:
        with Image.open(path, formats=tuple(set(PICTURE_FORMATS.values()))) as picture:
            exif = picture.getexif()
    except Exception:  # whatever Pillow meets in a stranger's file
        return False
    ours = str(exif.get(ExifTags.Base.Software)).startswith("prunet ")
    return ours and (prompt is None or exif.get(ExifTags.Base.ImageDescription) == _described(prompt))
