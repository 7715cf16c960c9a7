"""The training loop, to be read from top to bottom."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunet import processes
from prunet.console import progress
from prunet.data.cache import Cache
from prunet.denoisers.architecture import Net, config_of
from prunet.denoisers.pairs import Pair
from prunet.errors import NotFinite, UserError
from prunet.recipe.stage import Stage
from prunet.recipe.training import Training
from prunet.runtime import Runtime
from prunet.sampling.paths import path_times
from prunet.teacher.teacher import Teacher
from prunet.training.checkpoints import Saving, checkpoints
from prunet.training.fit import micro_batch_of
from prunet.training.log import Log, log_note
from prunet.training.lora import trainable
from prunet.training.objectives.distillation import Distillation
from prunet.training.objectives.guidance import Guidance
from prunet.training.objectives.objective import Objective
from prunet.training.objectives.trajectory import Trajectory
from prunet.training.samples import LiveSamples, PathSamples, Samples, SamplesOnPaths, batches
from prunet.training.session import Session
from prunet.training.sheets import Sheets
from prunet.training.stopping import stops_after_step
from prunet.training.sums import Sums


def learning_rate_at(stage: Training, step: int) -> float:
    """Returns the learning rate at a step: linear warm-up, then constant or half a cosine to 0."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def distil(
    teacher: Teacher,
    student: Net,
    pairs: Sequence[Pair],
    cache: Cache,
    stage: Stage,
    folder: Path | str,
    *,
    seed: int = 1234,
    **how: Any,
) -> Net:
    """Trains `student` to draw as `teacher` does; returns it with its EMA weights (if the stage has an EMA).

    If the stage trains a LoRA, the student that is returned still has it beside its weights.

    Args:
        cache: a cache of latents, or of paths if the stage has any.
        how: `runtime`, `sheets`, `saving`: see `train`.

    Raises:
        UserError: the cache is of another teacher, or `train` refuses something.
    """
    runtime = how.pop("runtime", None) or Runtime()
    configs = teacher.unet_config, config_of(student)
    processes.join(runtime.torch_device)
    # All processes use the smallest number, though their devices may differ, because they meet at every step.
    fits = micro_batch_of(stage, runtime, *configs, cache.latent_size, processes.count())
    micro_batch = min(number for _, number in processes.gather([(processes.rank(), fits)]))
    cache.check(teacher)
    trainable(student, stage.rank, seed)
    objective, samples = _objective(teacher, student, pairs, cache, stage, seed)
    return train(objective, student, samples, micro_batch, Path(folder), runtime=runtime, **how)


def _objective(
    teacher: Teacher, student: Net, pairs: Sequence[Pair], cache: Cache, stage: Stage, seed: int
) -> tuple[Objective, Samples]:
    """Returns the objective of the stage and its samples."""
    if stage.objective == "trajectory":
        return Trajectory(teacher, student), PathSamples(cache, stage, seed, teacher.process)
    if stage.has("paths"):
        times = path_times(teacher, stage.path_steps)
        samples: Samples = SamplesOnPaths(cache, stage, seed, teacher.process, times)
    elif not cache.has_text:
        samples = LiveSamples(cache, stage, seed, teacher)
    else:
        samples = Samples(cache, stage, seed, teacher.process)
    if stage.objective == "guidance":
        return Guidance(teacher, student, pairs, stage, cache.unconditional), samples
    return Distillation(teacher, student, pairs, stage), samples


def train(
    objective: Objective,
    student: Net,
    samples: Samples,
    micro_batch: int,
    folder: Path,
    *,
    runtime: Runtime,
    sheets: Sheets | None = None,
    saving: Saving | None = None,
) -> Net:
    """Trains the weights of `student` that require a gradient, for the stage of `samples`.

    Returns the student with its EMA weights (if the stage has an EMA). Resumes from the newest checkpoint in `folder`;
    on one CPU the result is bit-equal to that of a run that was never stopped. Writes `checkpoints/`, `log.jsonl` and
    `sheets/`. `micro_batch`: samples at once in each process.

    Raises:
        UserError: a checkpoint is of another stage, or a loss is not finite (the last good checkpoint stays).
    """
    stage, saving = samples.stage, saving or Saving()
    runtime.use_device()
    session = Session(student, stage, folder, runtime)
    objective.start(session)
    start, device = session.start, session.device
    micro_batches = batches(samples, start, micro_batch, processes.rank(), processes.count())
    accumulate = stage.batch_size // (micro_batch * processes.count())
    log = processes.from_main(lambda: Log(folder / "log.jsonl", start))
    sums = Sums([*objective.names, "grad_norm"], device, session.unlogged)

    with (
        progress("Training", stage.steps) as bar,
        session.running(objective.nets),
        objective.running(),
        stops_after_step() as stop,
    ):
        bar.advance(start)
        for step in range(start, stage.steps):
            if sheets and step == start == 0:
                with session.drawing(average=False) as net:
                    sheets.draw(0, net)
            learning_rate = learning_rate_at(stage, step)
            for micro in range(accumulate):
                batch = {key: value.to(device, non_blocking=True) for key, value in next(micro_batches).items()}
                with session.micro_step(last=micro == accumulate - 1):
                    loss, terms = objective(session.model, batch)
                    session.backward(loss / accumulate)
                sums.values[: len(terms)] += terms.detach() / accumulate
            sums.values[-1] += session.step(learning_rate)
            sums.steps, done = sums.steps + 1, step + 1
            bar.advance()

            save = done % saving.every == 0 or done == stage.steps
            draw = sheets is not None and sheets.every > 0 and (done % sheets.every == 0 or done == stage.steps)
            row_due = done % runtime.log_every == 0 or save or draw
            if not (row_due or stop.asked):
                continue
            # The only place where the CPU waits for the device.
            means = sums.means(session.accelerator.reduce(sums.values, "mean"))
            _check_finite(means, done, objective, session)
            if row_due:
                speed = round(sums.steps * stage.batch_size / sums.seconds, 4)
                rates = {"learning_rate": learning_rate, "images_per_s": speed}
                row = {"step": done, **objective.summary(means), **means, **rates}
                if session.accelerator.is_main_process:
                    log.write(row)
                    session.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
                bar.advance(0, log_note({**objective.summary(means), **rates}))
                if draw and sheets:
                    with session.drawing(average=True) as net:
                        sheets.draw(done, net)
                sums.clear()
            # The checkpoint is written last, so that log and sheet of its step exist when a run resumes from it.
            if save or stop.asked:
                session.save(done, saving.keep, sums.kept())
                stop.check()
            session.accelerator.wait_for_everyone()
    return session.finish()


def _check_finite(means: dict[str, float], step: int, objective: Objective, session: Session) -> None:
    """Refuses losses and gradients that are not finite; in fp16 the scaler skips the steps whose gradients overflow."""
    if all(map(math.isfinite, means.values())):
        return
    if reason := objective.blame():
        raise UserError(f"At step {step} {reason}")
    skipped = {"grad_norm"} if session.skips_overflow else set()
    bad = [name for name, value in means.items() if not math.isfinite(value) and name not in skipped]
    if bad:
        saved = checkpoints(session.folder)
        state = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
        raise NotFinite(
            f"The loss is not finite at step {step} ({', '.join(bad[:3])}); {state}, and the same command resumes from "
            f"there: try a lower learning_rate (now {session.stage.learning_rate:g}), more warmup_steps, a lower "
            "max_grad_norm, or --precision bf16 or no"
        )
