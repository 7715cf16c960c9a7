"""Short distillations of several students; longer ones only of the best students (successive halving)."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from prunet.console import say
from prunet.data.cache import Cache
from prunet.disk.files import check_writable
from prunet.errors import NotFinite, UserError
from prunet.hashing import json_hash
from prunet.plan.derived import Derived
from prunet.plan.plan import preset_names
from prunet.recipe.recipe import load_recipe
from prunet.recipe.stage import Stage
from prunet.runtime import Runtime
from prunet.search.scores import Scores, key_of
from prunet.search.sensitivity import cache_folder
from prunet.student.student import inherit
from prunet.training.checkpoints import Saving
from prunet.training.loop import distil
from prunet.words import many

#: Number of students, beside the presets, that are trained for a share of the steps; number of all that continue.
FIRST, SHARE, LAST = 6, 0.25, 3
BATCH = 16  # samples in a step
#: Below this learning rate training changes almost nothing.
LEAST_RATE = 1e-6


def learning_rate_for(error: float, usual: float) -> float:
    """Returns the learning rate for a student with this error before training; `usual` is for a broken one (error 1).

    A rate for a broken student breaks a good one: on emoji-sd a student with error 0.0001 went to 0.10 at the rate of
    1e-3, with which bk-small (0.65) learns. Adam moves each weight by about the rate, and errors are squared, so the
    rate is multiplied by the root of the error.
    """
    return max(LEAST_RATE, usual * math.sqrt(min(1.0, error)))


def check_micro_batch(micro_batch: int | None) -> None:
    """Refuses a micro-batch that the training of the students could not use, before they are scored.

    Raises:
        UserError: the micro-batch does not divide the batch.
    """
    if micro_batch and BATCH % micro_batch:
        fits = ", ".join(str(count) for count in range(1, BATCH + 1) if BATCH % count == 0)
        raise UserError(f"--micro-batch {micro_batch}: does not divide the {BATCH} samples of a step: choose {fits}")


def usual_rate(cache: Path | None) -> float:
    """Returns the learning rate of the run `cache`, or the default of a stage."""
    if cache is not None and (cache / "recipe.yaml").is_file():
        return float(load_recipe(cache / "recipe.yaml").stages[-1].learning_rate)
    return float(Stage.model_fields["learning_rate"].default)


def recover(
    students: Sequence[Derived], scores: Scores, cache: Path, steps: int, folder: Path, runtime: Runtime
) -> dict[str, dict[int, float]]:
    """Distils the students with the least error before training, and all presets; returns the errors after training.

    The result maps `key_of` a student to its errors by steps; a student whose training diverged has none. All presets
    among `students` take part because any of them can become the best. Resumes in `folder`; with other samples, steps
    or learning rates it trains from the beginning. At each rung, the best students of the rung before are trained
    further, and the best preset in any case, because few steps favour the students that begin near the teacher.
    Checkpoints of the others are deleted.

    Raises:
        UserError: the disk has no room for the checkpoints.
    """
    samples, usual, found = Cache.open(cache_folder(cache)), usual_rate(cache), dict[str, dict[int, float]]()
    folder /= json_hash([samples.spec, usual, steps, _stage(usual, steps, steps).warmup_steps])
    left = sorted(students, key=lambda student: scores.error(student).value)
    presets = [student for student in left if student.plan.name in preset_names()]
    for rung, most, others in ((max(1, round(SHARE * steps)), FIRST, len(presets)), (steps, LAST, 1)):
        best = [*left[:most], *[student for student in left if student in presets][:others]]
        for student in left:
            if student not in best:
                shutil.rmtree(folder / key_of(student), ignore_errors=True)
        left = [student for student in left if student in best]
        keys = {key_of(student): f"{key_of(student)} {rung} {folder.name}" for student in left}
        _check_disk([student for student in left if keys[key_of(student)] not in scores.kept("after")], folder)
        for student in left:
            if (key := keys[key_of(student)]) not in scores.kept("after"):
                stage = _stage(learning_rate_for(scores.error(student).value, usual), rung, steps)
                scores.keep("after", key, _train(student, scores, samples, stage, folder, runtime))
            errors = scores.kept("after")[key]
            if errors is None:
                after = "diverged"
                found.pop(key_of(student), None)
            else:
                error = found.setdefault(key_of(student), {})[rung] = scores.measure(errors).value
                after = f"{error:.4g}"
            say(f"  {student.plan.name}: {scores.error(student).value:.4g} before, {after} after {rung} steps")
        left = sorted(left, key=lambda student: found.get(key_of(student), {}).get(rung, math.inf))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _check_disk(students: Sequence[Derived], folder: Path) -> None:
    """Refuses training if a checkpoint of each student, and one that is being written, do not fit on the disk."""
    sizes = [12 * student.student_size.parameters for student in students]  # weights and two moments in fp32
    there = sum(f.stat().st_size for student in students for f in folder.glob(f"{key_of(student)}/checkpoints/*/*"))
    need, where = max(0, sum(sizes) - there) + max(sizes, default=0), check_writable(folder, "--output")
    if need > (free := shutil.disk_usage(where).free):
        raise UserError(
            f"--recover: no room for checkpoints of {len(students)} students ({many(need)}B) on the disk of {where}, "
            f"which has {many(free)}B free: give an --output on another disk, or search without --recover"
        )


def _stage(learning_rate: float, steps: int, most: int) -> Stage:
    """The first `steps` of a training of `most` steps: a student that continues equals one that begins again."""
    warmup = min(10, round(SHARE * most) // 4)
    return Stage(steps=steps, batch_size=BATCH, learning_rate=learning_rate, warmup_steps=warmup, ema_decay=None)


def _train(
    student: Derived, scores: Scores, samples: Cache, stage: Stage, folder: Path, runtime: Runtime
) -> list[float] | None:
    """Trains a student; returns its squared errors by group of examples, None if it diverged."""
    try:
        net = distil(
            scores.teacher,
            inherit(scores.teacher.unet, student),
            student.pairs(),
            samples,
            stage,
            folder / key_of(student),
            seed=1,  # all students see the same samples and noise
            runtime=runtime,
            saving=Saving(every=max(stage.steps // 4, 1), keep=1),
        )
        return scores.error_of(net)
    except NotFinite:
        return None
