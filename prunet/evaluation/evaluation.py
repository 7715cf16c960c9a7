"""Compares students with their teacher: their distance, size and speed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunet import processes
from prunet.console import progress
from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.condition import Condition
from prunet.disk.files import new_file
from prunet.disk.seals import file_checksum
from prunet.evaluation.drawing import batches, draw_all
from prunet.evaluation.image_to_image import Pictures, image_to_image
from prunet.evaluation.results import NOISE, Distance, EvaluationProtocol, EvaluationResult
from prunet.hashing import seed_of
from prunet.intervals import Array, bootstrap, mean_of
from prunet.plan.size import size_of
from prunet.recipe.recipe import Evaluation, read_prompts
from prunet.recipe.values import Drawing
from prunet.sampling.pictures import picture_rmse
from prunet.speed.clock import time_denoisers
from prunet.teacher.teacher import Teacher
from prunet.training.sheets import grid

#: Noise levels at which the denoisers are compared, as shares of the noise schedule.
LEVELS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
SHEET_COLUMNS = 8


def evaluate(
    teacher: Teacher,
    students: Mapping[str, Net],
    spec: Evaluation,
    folder: Path | str,
    *,
    size: int,
    seed: int,
    drawing: Drawing | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Draws held-out prompts with the teacher and each student (such as `before` and `after`), and compares them.

    `spec` says how the teacher draws, and also the students unless `drawing` is given.

    Writes `pictures/NAME/0000.png`, `image-to-image/NAME/0000.png`, `sheet.png`, `evaluation.json` and `evaluation.md`
    into `folder`. Size and speed are the last student's, in the teacher's precision. Several processes divide the
    drawing. Finished batches lie in `drawn/` until everything is written, so a stopped evaluation resumes.
    """
    folder = Path(folder)
    processes.join(teacher.device)
    prompts = read_prompts(spec.prompts, spec.limit)
    models: dict[str, Any] = {"teacher": teacher.unet}
    models |= {n: nn.Module.to(net, teacher.device, teacher.dtype).eval() for n, net in students.items()}
    latents: dict[str, Tensor] = {}
    pictures: Pictures = {}
    hows = {name: spec if name == "teacher" else drawing or spec for name in models}
    with progress("Evaluating", len(prompts) * len(models)) as bar:
        for name, net in models.items():
            bar.advance(0, note=name)
            kept = folder / "drawn" / name
            latents[name], pictures[name] = draw_all(
                teacher, net, prompts, hows[name], kept, size=size, seed=seed, bar=bar
            )
    inputs = pictures["teacher"][: spec.image_to_image]
    changed = image_to_image(teacher, models, hows, prompts, inputs, size=size, seed=seed)
    last = list(students)[-1]
    both = {"teacher": models["teacher"], "student": models[last]}
    result = EvaluationResult(
        protocol=EvaluationProtocol(
            prompts=prompts,
            seed=seed,
            size=size,
            **spec.model_dump(include={"steps", "guidance_scale", "sampler"}),
            levels=list(LEVELS),
            noise=NOISE,
            precision=str(teacher.dtype).removeprefix("torch."),
            **(protocol or {}),
        ),
        drawn=drawing,
        sizes={name: size_of(dict(net.config)) for name, net in both.items()},
        speed=processes.from_main(lambda: time_denoisers(both, device=teacher.device)),
        distance={name: _distance(teacher, models[name], prompts, latents, pictures, name, seed) for name in students},
        image_to_image=changed and changed[0],
    )
    return processes.from_main(lambda: _write(folder, result, pictures, changed[1] if changed else {}))


def _distance(
    teacher: Teacher,
    net: Net,
    prompts: list[str],
    latents: Mapping[str, Tensor],
    pictures: Pictures,
    name: str,
    seed: int,
) -> Distance:
    error, power = denoiser_errors(teacher, net, prompts, latents["teacher"], seed)
    by_level = error.sum(axis=0) / power.sum(axis=0)
    apart = (latents[name] - latents["teacher"]).double().square().mean(dim=(1, 2, 3)).tolist()
    by_prompt = [picture_rmse(a, b) for a, b in zip(pictures[name], pictures["teacher"], strict=True)]
    found = {
        "denoiser": bootstrap(len(prompts), lambda which: (error[which].sum(-2) / power[which].sum(-2)).mean(-1)),
        "latent": mean_of(apart),
        "picture": mean_of(by_prompt),
    }
    return Distance(
        denoiser=found["denoiser"].value,
        latent=found["latent"].value,
        picture=found["picture"].value,
        denoiser_by_level=by_level.tolist(),
        picture_by_prompt=by_prompt,
        intervals={key: (value.low, value.high) for key, value in found.items()},
    )


@torch.no_grad()
def denoiser_errors(teacher: Teacher, net: Net, prompts: list[str], latents: Tensor, seed: int) -> tuple[Array, Array]:
    """Returns the squared error of the denoiser's output, and the teacher's squared output, each (B, len(LEVELS)).

    The inputs are the teacher's own latents (B, 4, h, w), and noise that depends only on the seed, so every student of
    a teacher gets the same inputs. It is not the noise that the latents were drawn from: with that the inputs would lie
    near the teacher's own paths, where errors are smaller.
    """
    process, call = teacher.process, teacher.architecture.call
    takes_scale = teacher.architecture.takes_guidance(config_of(net))
    side = latents.shape[-1] * teacher.vae_scale
    mine = []
    for batch, rows in enumerate(batches(len(prompts))):
        if not processes.is_mine(batch):
            continue
        clean = latents[rows].cpu()
        sizes = teacher.size_condition([(side, side, 0, 0, side, side)] * len(clean))
        condition = Condition(teacher.encode_prompts(prompts[rows]) | sizes)
        unguided = {"guidance_scale": torch.ones(len(clean), device=teacher.device)} if takes_scale else {}
        calls = (net, Condition(condition | unguided)), (teacher.unet, condition)
        seeds = [seed_of("denoiser", seed, rows.start + i) for i in range(len(clean))]
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
        sums = np.zeros((2, len(clean), len(LEVELS)))  # error, power
        for i, level in enumerate(LEVELS):
            t = torch.full((len(clean),), process.timestep_at(level))
            noisy = process.add_noise(clean, noise, t).to(teacher.device, teacher.dtype)
            t = t.to(teacher.device)
            ours, theirs = (call(model, noisy, t, given).double().cpu() for model, given in calls)
            sums[0, :, i] = (ours - theirs).square().sum(dim=(1, 2, 3)).numpy()
            sums[1, :, i] = theirs.square().sum(dim=(1, 2, 3)).numpy()
        mine.append((rows.start, sums))
    error, power = np.concatenate([sums for _, sums in processes.gather(mine)], axis=1)
    return error, power


def _write(folder: Path, result: EvaluationResult, pictures: Pictures, changed: Pictures) -> EvaluationResult:
    """Writes all files; returns the result with checksums of its pictures. `changed`: pictures of image to image."""
    sums, prompts = {}, result.protocol.prompts
    for place, by_name in (("pictures", pictures), ("image-to-image", changed)):
        for name, drawn in by_name.items():
            for i, picture in enumerate(drawn):
                path = folder / place / name / f"{i:04d}.png"
                with new_file(path) as part:
                    picture.save(part, format="PNG")
                sums[str(path.relative_to(folder))] = file_checksum(path)
    labels = [name if name == "teacher" else f"student {name}" for name in pictures]
    rows = [drawn[:SHEET_COLUMNS] for drawn in pictures.values()]
    with new_file(folder / "sheet.png") as part:
        grid(rows, labels, prompts[:SHEET_COLUMNS]).save(part, format="PNG")
    sums["sheet.png"] = file_checksum(folder / "sheet.png")
    result = result.model_copy(update={"pictures": sums})
    result.write(folder)
    shutil.rmtree(folder / "drawn", ignore_errors=True)
    return result
