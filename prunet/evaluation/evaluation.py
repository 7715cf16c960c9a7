"""Compares students with their teacher: how near they are, and how much smaller and faster."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunet import processes
from prunet.console import progress
from prunet.denoisers.architecture import Net
from prunet.denoisers.condition import Condition
from prunet.disk.files import new_file, write_json, write_text
from prunet.disk.seals import file_checksum
from prunet.evaluation.drawing import batches, draw_all
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


@dataclass(frozen=True)
class Distance:
    """The distance from the teacher at equal prompts and seeds; lower is nearer.

    - `denoiser`: squared error of the output over the teacher's mean square, mean over noise levels;
      `denoiser_by_level`: the same at each of `LEVELS`.
    - `latent`: mean squared error of the final latents.
    - `picture`: root mean squared error of the pictures, 0 to 1; `picture_by_prompt`: the same for each.
    - `intervals`: 95 % intervals of `denoiser`, `latent` and `picture`, over the prompts.
    """

    denoiser: float
    denoiser_by_level: list[float]
    latent: float
    picture: float
    picture_by_prompt: list[float]
    intervals: dict[str, tuple[float, float]]


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
) -> dict[str, Any]:
    """Draws held-out prompts with the teacher and each student (`before` and `after`, say), and compares them.

    `spec` says how to draw with the teacher, and with the students unless `drawing` says so.

    Writes `pictures/NAME/0000.png`, `sheet.png`, `evaluation.json` and `evaluation.md` into `folder`, and returns what
    the JSON holds. Size and speed are the last student's, in the teacher's precision. Several processes share out the
    drawing. Finished batches lie in `drawn/` until all is written, so that a stopped evaluation resumes.
    """
    folder = Path(folder)
    processes.join(teacher.device)
    prompts = read_prompts(spec.prompts, spec.limit)
    models: dict[str, Any] = {"teacher": teacher.unet}
    models |= {name: net.to(teacher.device, teacher.dtype).eval() for name, net in students.items()}
    latents: dict[str, Tensor] = {}
    pictures: dict[str, list[Image.Image]] = {}
    with progress("Evaluating", len(prompts) * len(models)) as bar:
        for name, net in models.items():
            how = spec if name == "teacher" else drawing or spec
            bar.advance(0, note=name)
            kept = folder / "drawn" / name
            latents[name], pictures[name] = draw_all(teacher, net, prompts, how, kept, size=size, seed=seed, bar=bar)
    last = list(students)[-1]
    distances = {
        name: asdict(_distance(teacher, net, prompts, latents, pictures, name, seed))
        for name, net in models.items()
        if name != "teacher"
    }
    result = {
        "protocol": {
            "prompts": prompts,
            "seed": seed,
            "size": size,
            **spec.model_dump(include={"steps", "guidance_scale", "sampler"}),
            "levels": list(LEVELS),
            "precision": str(teacher.dtype).removeprefix("torch."),
            **(protocol or {}),
        },
        **({"drawn": drawing.model_dump(mode="json")} if drawing else {}),
        "sizes": {
            name: {k: v for k, v in asdict(size_of(dict(net.config))).items() if k != "latent_size"}
            for name, net in (("teacher", models["teacher"]), ("student", models[last]))
        },
        "speed": processes.from_main(
            lambda: time_denoisers({"teacher": models["teacher"], "student": models[last]}, device=teacher.device)
        ),
        "distance": distances,
    }
    return processes.from_main(lambda: _write(folder, result, pictures, prompts))


def _distance(
    teacher: Teacher,
    net: Net,
    prompts: list[str],
    latents: Mapping[str, Tensor],
    pictures: Mapping[str, list[Image.Image]],
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
        **{key: value.value for key, value in found.items()},
        denoiser_by_level=by_level.tolist(),
        picture_by_prompt=by_prompt,
        intervals={key: (value.low, value.high) for key, value in found.items()},
    )


@torch.no_grad()
def denoiser_errors(teacher: Teacher, net: Net, prompts: list[str], latents: Tensor, seed: int) -> tuple[Array, Array]:
    """Returns the squared error of the denoiser's output, and the teacher's squared output, each (B, len(LEVELS)).

    The inputs are the teacher's own latents (B, 4, h, w), and noise that comes from the seed alone, so every student of
    a teacher gets the same inputs.
    """
    process, call = teacher.process, teacher.architecture.call
    side = latents.shape[-1] * teacher.vae_scale
    mine = []
    for batch, rows in enumerate(batches(len(prompts))):
        if not processes.is_mine(batch):
            continue
        clean = latents[rows].cpu()
        sizes = teacher.size_condition([(side, side, 0, 0, side, side)] * len(clean))
        condition = Condition(teacher.encode_prompts(prompts[rows]) | sizes)
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed + rows.start + i))
                for i in range(len(clean))
            ]
        )
        sums = np.zeros((2, len(clean), len(LEVELS)))  # error, power
        for i, level in enumerate(LEVELS):
            t = torch.full((len(clean),), process.timestep_at(level))
            noisy = process.add_noise(clean, noise, t).to(teacher.device, teacher.dtype)
            t = t.to(teacher.device)
            ours, theirs = (call(m, noisy, t, condition).double().cpu() for m in (net, teacher.unet))
            sums[0, :, i] = (ours - theirs).square().sum(dim=(1, 2, 3)).numpy()
            sums[1, :, i] = theirs.square().sum(dim=(1, 2, 3)).numpy()
        mine.append((rows.start, sums))
    error, power = np.concatenate([sums for _, sums in processes.gather(mine)], axis=1)
    return error, power


def _write(
    folder: Path, result: dict[str, Any], pictures: Mapping[str, list[Image.Image]], prompts: list[str]
) -> dict[str, Any]:
    """Writes all files; returns the result with the checksums of its pictures."""
    sums = {}
    for name, drawn in pictures.items():
        for i, picture in enumerate(drawn):
            path = folder / "pictures" / name / f"{i:04d}.png"
            with new_file(path) as part:
                picture.save(part, format="PNG")
            sums[str(path.relative_to(folder))] = file_checksum(path)
    labels = [name if name == "teacher" else f"student {name}" for name in pictures]
    rows = [drawn[:SHEET_COLUMNS] for drawn in pictures.values()]
    with new_file(folder / "sheet.png") as part:
        grid(rows, labels, prompts[:SHEET_COLUMNS]).save(part, format="PNG")
    write_text(folder / "evaluation.md", markdown(result))
    result = result | {"pictures": sums | {"sheet.png": file_checksum(folder / "sheet.png")}}
    write_json(folder / "evaluation.json", result)
    shutil.rmtree(folder / "drawn", ignore_errors=True)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Formats the evaluation in Markdown: one table of size and speed, one of distances."""
    sizes, speed = result["sizes"], result["speed"]
    speeds = speed["speeds"]

    def row(label: str, values: Iterable[float], form: str) -> str:
        teacher, student = values
        return f"| {label} | {form.format(teacher)} | {form.format(student)} | {100 * student / teacher:.0f} % |"

    lines = ["| | teacher | student | student / teacher |", "|---|---:|---:|---:|"]
    lines.append(row("U-Net parameters (M)", (sizes[n]["parameters"] / 1e6 for n in sizes), "{:.2f}"))
    lines.append(row("multiply-adds of a call (G)", (sizes[n]["macs"] / 1e9 for n in sizes), "{:.3f}"))
    lines.append(row("latency of a call (ms)", (speeds[n]["latency_ms"] for n in speeds), "{:.1f}"))
    if all(s["peak_memory_mb"] for s in speeds.values()):
        lines.append(row("peak memory of a call (MB)", (speeds[n]["peak_memory_mb"] for n in speeds), "{:.0f}"))
    distance = result["distance"]
    protocol = result["protocol"]
    teachers = Drawing(**{key: protocol[key] for key in Drawing.model_fields})
    if "drawn" in result:
        students = Drawing(**result["drawn"])
        calls = [how.steps * how.rows for how in (teachers, students)]
        lines.append(row("samples through the U-Net for a picture", calls, "{:.0f}"))
    lines += [
        "",
        f"Latency: median of {speed['repeats']} calls in turn, batch {speed['batch_size']}, {speed['device']}, "
        f"{speed['dtypes']['student']}.",
        "",
        f"Distance from the teacher on {len(protocol['prompts'])} held-out prompts at equal seeds (lower is nearer; in "
        "brackets 95 % intervals over the prompts):",
        "",
        "| | " + " | ".join(distance) + " |",
        "|---|" + "---:|" * len(distance),
    ]
    for label, key in (
        ("denoiser output, relative squared error", "denoiser"),
        ("final latents, mean squared error", "latent"),
        ("pictures, root mean squared error (0 to 1)", "picture"),
        ("pictures, LPIPS (VGG16)", "lpips"),
    ):
        if any(key not in d for d in distance.values()):
            continue  # LPIPS is optional
        cells = (
            f"{d[key]:.4f} [{d['intervals'][key][0]:.4f}, {d['intervals'][key][1]:.4f}]" for d in distance.values()
        )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", f"{teachers}, {protocol['size']} px, seed {protocol['seed']}, {protocol['precision']}."]
    if "drawn" in result:
        lines += [
            "",
            f"The student draws as it was made for: {students}. Its denoiser is not meant to give the output of a call "
            "of the teacher's without guidance, so compare pictures.",
        ]
    return "\n".join(lines) + "\n"
