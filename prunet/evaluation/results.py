"""The result of an evaluation, as a value and as a table."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from prunet.disk.files import write_text
from prunet.disk.seals import file_checksum
from prunet.disk.steps import Step
from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.plan.effect import Size
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.speed.clock import Speeds

#: Rows of the table of distances: title, field of `Distance`.
DISTANCES = (
    ("denoiser output, relative squared error", "denoiser"),
    ("final latents, mean squared error", "latent"),
    ("pictures, root mean squared error (0 to 1)", "picture"),
    ("pictures, LPIPS (VGG16)", "lpips"),
)


class Distance(Value):
    """The distance from the teacher at equal prompts and seeds; lower is nearer.

    - `denoiser`: squared error of the output over the teacher's mean square, mean over noise levels;
      `denoiser_by_level`: the same at each of the protocol's `levels`.
    - `latent`: mean squared error of the final latents.
    - `picture`: root mean squared error of the pictures, 0 to 1; `picture_by_prompt`: the same for each.
    - `intervals`: 95 % intervals of `denoiser`, `latent` and `picture`, over the prompts.
    - `lpips`, `lpips_by_prompt`: perceptual distance of the pictures, if it was added.
    """

    denoiser: float
    denoiser_by_level: list[float]
    latent: float
    picture: float
    picture_by_prompt: list[float]
    intervals: dict[str, tuple[float, float]]
    lpips: float | None = None
    lpips_by_prompt: list[float] | None = None


class PictureDistance(Value):
    """Root mean squared error of a student's pictures from the teacher's, 0 to 1, with a 95 % interval."""

    picture: float
    by_picture: list[float]
    interval: tuple[float, float]


class ImageToImage(Value):
    """The distance of students that start from the teacher's pictures of the first evaluation prompts.

    - `prompts`: the prompt for picture i. `seed`: of picture 0; that of picture i is i more.
    - `distance`: of each student by its name.
    """

    strength: float
    seed: int
    prompts: list[str]
    distance: dict[str, PictureDistance]


#: The noise that the denoisers get: not that which the pictures were drawn from.
NOISE = "independent"


class EvaluationProtocol(Value):
    """The protocol of an evaluation. `teacher` and `student`: fingerprints, only in a run.

    `noise`: `independent` if the denoisers got other noise than that which the pictures were drawn from. Evaluations of
    prunet 0.2 used that noise (None); their errors of the denoiser are 6 to 8 % smaller.
    """

    prompts: list[str]
    seed: int
    size: int
    steps: int
    guidance_scale: float
    sampler: str
    levels: list[float]
    noise: str | None = None
    precision: str
    teacher: str | None = None
    student: str | None = None

    @property
    def drawing(self) -> Drawing:
        """How the teacher drew."""
        return Drawing(steps=self.steps, guidance_scale=self.guidance_scale, sampler=self.sampler)


class EvaluationResult(Value):
    """The result of `evaluate` (`evaluation.json`).

    - `drawn`: how the students drew, if not like the teacher.
    - `sizes` and `speed`: of `teacher` and `student`, the last one.
    - `distance`: of each student by its name.
    - `image_to_image`: of pictures that start from a picture; None if it was not measured.
    - `pictures`: checksums by path in the folder. `lpips`: hash of the weights that measured it.
    """

    protocol: EvaluationProtocol
    drawn: EmbeddedGuidance | Drawing | None = None
    sizes: dict[str, Size]
    speed: Speeds
    distance: dict[str, Distance]
    image_to_image: ImageToImage | None = None
    pictures: dict[str, str] = Field(default={})
    lpips: str | None = None

    def write(self, folder: Path) -> None:
        """Writes `evaluation.json` and `evaluation.md`."""
        write_text(folder / "evaluation.md", markdown(self))
        self.save(folder / "evaluation.json")


def read_evaluation(folder: Path, steps: Mapping[str, Step] | None = None) -> EvaluationResult:
    """Reads the result that `evaluate` wrote into a folder. `steps`: the run's finished steps, to check the student.

    Raises:
        UserError: the result is missing, not readable, changed, or of another student or version.
    """
    again = f"delete {folder} and run it again"
    evaluation = EvaluationResult.load(folder / "evaluation.json", again)
    for name, expected in evaluation.pictures.items():
        if (path := folder / name).is_file() and file_checksum(path) != expected:
            raise UserError(f"{path}: damaged or changed (its checksum is another than when it was drawn): {again}")
    last = max((name for name in steps or {} if name.startswith("stage-")), key=lambda n: int(n[6:]), default=None)
    if steps and last and evaluation.protocol.student not in (None, steps[last].inputs):
        raise UserError(f"{folder / 'evaluation.json'}: of another student than {folder.parent / last}: {again}")
    return evaluation


def markdown(result: EvaluationResult) -> str:
    """Formats the evaluation in Markdown: one table of size and speed, one of distances."""
    speed, protocol, distance = result.speed, result.protocol, result.distance
    names = ("teacher", "student")
    sizes, speeds = [result.sizes[name] for name in names], [speed.speeds[name] for name in names]

    def row(label: str, values: Iterable[float], form: str) -> str:
        teacher, student = values
        return f"| {label} | {form.format(teacher)} | {form.format(student)} | {100 * student / teacher:.0f} % |"

    lines = ["| | teacher | student | student / teacher |", "|---|---:|---:|---:|"]
    lines.append(row("U-Net parameters (M)", (size.parameters / 1e6 for size in sizes), "{:.2f}"))
    lines.append(row("multiply-adds of a call (G)", (size.macs / 1e9 for size in sizes), "{:.3f}"))
    lines.append(row("latency of a call (ms)", (one.latency_ms for one in speeds), "{:.1f}"))
    if all(memory := [one.peak_memory_mb or 0 for one in speeds]):
        lines.append(row("peak memory of a call (MiB)", memory, "{:.0f}"))
    if result.drawn:
        calls = [how.steps * how.rows for how in (protocol.drawing, result.drawn)]
        lines.append(row("samples through the U-Net for a picture", calls, "{:.0f}"))
    lines += [
        "",
        f"Latency: median of {speed.repeats} calls in turn, batch {speed.batch_size}, {speed.device}, "
        f"{speed.dtypes['student']}.",
        "",
        f"Distance from the teacher on {len(protocol.prompts)} held-out prompts at equal seeds (lower is nearer; in "
        "brackets 95 % intervals over the prompts):",
        "",
        "| | " + " | ".join(distance) + " |",
        "|---|" + "---:|" * len(distance),
    ]
    for label, key in DISTANCES:
        found = [(getattr(one, key), *one.intervals.get(key, ())) for one in distance.values()]
        if all(value is not None for value, *_ in found):  # LPIPS is optional
            lines.append(_cells(label, found))
    if changed := result.image_to_image:
        ours = [(changed.distance[name].picture, *changed.distance[name].interval) for name in distance]
        lines.append(_cells(f"pictures from {len(changed.prompts)} pictures of the teacher's (image to image)", ours))
    lines += ["", f"{protocol.drawing}, {protocol.size} px, seed {protocol.seed}, {protocol.precision}."]
    if result.drawn:
        lines += [
            "",
            f"The student draws as it was made for: {result.drawn}. Its denoiser is not meant to give the output of a "
            "call of the teacher's without guidance, so compare pictures.",
        ]
    return "\n".join(lines) + "\n"


def _cells(label: str, found: Iterable[tuple[float, ...]]) -> str:
    return f"| {label} | " + " | ".join("{:.4f} [{:.4f}, {:.4f}]".format(*numbers) for numbers in found) + " |"
