"""Stock pipelines: drawing with them, and writing a student as one."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import ExifTags, Image
from safetensors.torch import save_file
from torch import Tensor

from prunet import __version__
from prunet.console import progress
from prunet.disk.files import new_file, new_folder
from prunet.disk.seals import SEAL, verify
from prunet.errors import UserError, printable
from prunet.plan.size import example_inputs
from prunet.report.charts import short
from prunet.teacher import ldm, marks
from prunet.teacher.teacher import Teacher, after_overflow, freeze

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
            for path, picture in zip(save_to[at], pictures, strict=bool(save_to)):
                with new_file(path) as part:
                    picture.save(part, format=PICTURE_FORMATS[path.suffix.lower()], exif=_drawn_by())
            out += pictures
            bar.advance(len(pictures))
    return out


def _drawn_by() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"prunet {__version__}"
    return exif


def is_drawn(path: Path) -> bool:
    """Whether a file is a picture that `draw` wrote."""
    try:
        with Image.open(path, formats=tuple(set(PICTURE_FORMATS.values()))) as picture:
            return str(picture.getexif().get(ExifTags.Base.Software)).startswith("prunet ")
    except Exception:  # whatever Pillow meets in a stranger's file
        return False


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
    for prompt, seed, latents in zip(prompts, seeds, result.images, strict=True):
        if not latents.isfinite().all():
            raise UserError(
                f"{prompt!r} (seed {seed}): what the U-Net drew is not finite in {dtype}, so it is no picture: "
                f"{after_overflow(dtype)}"
            )
    return result.images.float()


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
    return pipe.image_processor.postprocess(pixels.float(), output_type="pil")


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
        from prunet.data.encoding import check_size

        check_size(teacher, size, "size")
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


# -- writing a student


def export(
    teacher: Teacher,
    student: UNet2DConditionModel,
    folder: Path | str,
    *,
    card: dict[str, Any] | None = None,
    fp16: bool = False,
    what: str = "pipeline",
) -> Path:
    """Writes `student` with the teacher's other parts as a stock pipeline folder, and opens it again to be sure.

    The other parts' weights are the teacher's, byte for byte. `fp16` adds the half-precision variant of the U-Net, the
    VAE and the text encoders (`from_pretrained(..., variant="fp16")`). `card` fills the model card (`card.md.j2`). The
    folder is sealed as a `what` of prunet's; one that was there is replaced.

    Raises:
        UserError: no space, or no permission.
        RuntimeError: what was written does not load to the same bits (nothing is left behind then).
    """
    folder = Path(folder)
    with new_folder(folder, what) as part:
        teacher.save_parts(part)
        write_unet(student, part / "unet")
        if fp16:
            _write_fp16(part, teacher)
        (part / "README.md").write_text(model_card(card or origin(teacher)), encoding="utf-8")
        check_export(part, student)
    return folder


def write_unet(net: UNet2DConditionModel, folder: Path) -> None:
    """A stock diffusers folder of one denoiser, in one file."""
    net.save_pretrained(folder, safe_serialization=True, max_shard_size="1TB")
    # A config carries where its model was opened from, which means nothing elsewhere.
    config = folder / "config.json"
    value = json.loads(config.read_text(encoding="utf-8"))
    value.pop("_name_or_path", None)
    config.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_fp16(folder: Path, teacher: Teacher) -> None:
    from safetensors.torch import load_file

    for part in ("unet", "vae", *teacher.text_encoders):
        for file in (folder / part).glob("*.safetensors"):
            half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
            save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})


def check_export(folder: Path, student: UNet2DConditionModel) -> None:
    """Opens the folder with stock diffusers and compares the U-Net bit for bit: config, weights, one output."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    # Frozen, both of them: a matmul may take another path, and round otherwise, where a weight wants a gradient.
    again, ours = (freeze(net.to("cpu")) for net in (pipe.unet, student))
    expected = ours.state_dict()
    got = again.state_dict()
    if got.keys() != expected.keys() or any(not torch.equal(got[k], expected[k].float()) for k in expected):
        raise RuntimeError(f"{folder}: the U-Net did not load to the same weights")
    side = 2 ** (len(ours.config["block_out_channels"]) - 1)
    inputs = example_inputs(dict(ours.config), latent_size=(side, side))
    inputs["sample"] = torch.linspace(-2, 2, inputs["sample"].numel()).view_as(inputs["sample"])
    with torch.no_grad():
        if not torch.equal(again(**inputs).sample, ours.float()(**inputs).sample):
            raise RuntimeError(f"{folder}: the U-Net loaded by diffusers computes something else")


def export_single_file(pipeline: Path | str, path: Path | str, *, fp16: bool = False) -> Path:
    """Writes a pipeline folder as one `.safetensors` in the original LDM layout, with its configs in `NAME.config`.

    Raises:
        UserError: not a pipeline folder, or damaged; or `path` does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: name the single file something.safetensors")
    verify(Path(pipeline), f"delete {pipeline} and export it again")
    source = Teacher(pipeline, dtype=torch.float16 if fp16 else torch.float32)
    encoders = {name: source.text_part(name) for name in source.text_encoders}
    tensors = ldm.to_ldm(source.unet, source.vae, **encoders, dtype=source.dtype)  # type: ignore[arg-type]
    config = source.noise_scheduler.config
    marked, metadata = marks.mark(config, source.layout, path.stem, source.native_size)
    with new_folder(path.with_suffix(".config"), "configs") as part:
        ignored = shutil.ignore_patterns("*.safetensors", "README.md", SEAL)
        shutil.copytree(pipeline, part, ignore=ignored, dirs_exist_ok=True)
    with new_file(path) as file:
        marks.save_marked({**tensors, **marked}, metadata, file)
    again = ldm.from_ldm_unet(path, source.unet_config).state_dict()
    if any(not torch.equal(again[k], v) for k, v in source.unet.state_dict().items()):
        path.unlink()
        raise RuntimeError(f"{path}: the U-Net did not load to the same weights")
    return path


def origin(teacher: Teacher) -> dict[str, Any]:
    """What a model card says of where a student comes from; `base_model` only where the hub has it."""
    return {"teacher": teacher.hub_id or short(teacher.source), "base_model": teacher.hub_id}


def model_card(facts: dict[str, Any]) -> str:
    """The README of an exported pipeline, from plan, recipe, data, measures and licence.

    What a user wrote means itself alone there: it ends no YAML, no code, no table and no heading.
    """
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("prunet.exports", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"quoted": _quoted, "code": _code, "words": _words}
    return env.get_template("card.md.j2").render(**facts)


def _quoted(text: str) -> str:
    """A string of YAML and of Python in one line, whatever is in it."""
    # json.dumps leaves other line ends as they are, and would write an emoji as two halves.
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(text, ensure_ascii=False),
    )


def _code(text: str) -> str:
    """A span of Markdown code: one line between more backticks than it holds."""
    line = printable(" ".join(str(text).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _words(text: str) -> str:
    """Text of Markdown in one line: marks and HTML as characters."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", printable(" ".join(str(text).split())))
