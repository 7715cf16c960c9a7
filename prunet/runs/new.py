"""`prunet new`: a commented recipe that fits a model, its data and the memory of a device."""

import math
import re
import statistics
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import yaml
from safetensors import safe_open

from prunet.console import progress
from prunet.data.contents import has_files
from prunet.data.pictures import BrokenPicture
from prunet.data.sources import check_source, read_pictures
from prunet.disk.reading import parse_yaml
from prunet.errors import UserError, one_line
from prunet.plan.plan import Plan, load_plan
from prunet.recipe.paths import in_full, shipped_names
from prunet.recipe.recipe import Recipe, load_recipe, read_prompts
from prunet.runs.estimate import COUNTED, memory
from prunet.runs.run import Run
from prunet.runtime import Runtime
from prunet.sampling.paths import check_jumps
from prunet.teacher.teacher import Teacher
from prunet.training.fit import device_memory, training_memory
from prunet.training.least_squares import samples_for
from prunet.words import short

#: The plan for each layout if none is given.
USUAL_PLAN = {"sd-v1": "bk-small", "sd-v2": "bk-small", "sdxl": "ssd-1b"}
PROMPT_FILES = (".txt", ".csv", ".tsv")
LOOKED_AT = 200  # pictures whose sizes are looked at
BATCH = 32
#: How often BK-SDM saw each of its 212,776 pictures, in 50,000 steps of 256.
SEEN = 60
STEPS = (1_000, 50_000)  # fewest and most steps
#: Steps of a path of the teacher, and fewest and most paths, for a student that draws in a few steps.
PATH_STEPS, PATHS = 24, (2_000, 50_000)
#: A micro-batch that uses a device well; if less fits, options that save memory are tried.
ENOUGH = 4
#: Options that save memory, cheapest first, by the kind of device.
SAVING = {
    "cuda": ("offload_ema", "teacher_8bit", "use_8bit_adam", "gradient_checkpointing"),
    "cpu": ("gradient_checkpointing",),
}


@dataclass(frozen=True)
class Fit:
    """Settings with which distillation fits into memory: micro-batch, command-line options, and the needed bytes."""

    micro_batch: int
    options: tuple[str, ...]
    needs: int
    budget: int

    @property
    def flags(self) -> str:
        """The options, as typed on the command line."""
        return "".join(f" --{option.replace('_', '-')}" for option in self.options)


def new_recipe(
    teacher: str,
    data: str,
    *,
    plan: str | None = None,
    config: str | None = None,
    jumps: int | None = None,
    budget: int | None = None,
    runtime: Runtime | None = None,
) -> str:
    """Returns the text of a recipe for a teacher and data; comments describe both.

    Args:
        teacher: diffusers folder, `.safetensors` file or hub id.
        data: pictures with captions, as `data.source`, or a text file of prompts.
        plan: a preset; by default the usual one of the teacher's layout.
        config: for a single file: folder or hub id with configs and tokenizers.
        jumps: steps in which the student draws, without guidance; by default it draws like the teacher.
        budget: bytes of the device's memory that may be used; by default what `device_memory` says.

    Raises:
        UserError: the teacher, the plan, the data or so many jumps cannot be used.
    """
    runtime = runtime or Runtime()
    opened = Teacher(teacher, config=config)
    opened.check_weights(headers_only=True)
    chosen = load_plan(plan or USUAL_PLAN[opened.layout])
    found = data_facts(data, opened.native_size)
    if jumps and (count := opened.process.num_timesteps) % jumps:
        raise UserError(f"--jumps {jumps}: give a divisor of the teacher's {count} timesteps, such as 4")
    stage = usual_stage(chosen, opened.layout)
    if found["kind"] == "prompts":  # random captions need this, and bring students nearer: benchmarks/best.yaml
        stage["losses"]["task"] = 0.0
    many = found["count"] is None or found.get("or_more")
    steps = STEPS[1] if many else min(max(STEPS[0], SEEN * found["count"] // BATCH), STEPS[1])
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(short(teacher)).stem)
    seen = steps * BATCH / (found["count"] or math.inf)
    model = {"source": in_full(teacher), "config": in_full(config)} if config else in_full(teacher)
    facts: dict[str, Any] = {
        "teacher": model,
        "name": short(teacher),
        "layout": opened.layout,
        "size": opened.native_size,
        "prediction": opened.noise_scheduler.config.prediction_type,
        "license": license_of(opened),
        "plan": chosen.name if chosen.name == plan or plan is None else in_full(str(plan)),
        "about": chosen.description,
        "data": {**found, "given": in_full(data)},
        "buckets": opened.kind == "sdxl" and found.get("shapes", 1) > 1,
        "stage": stage,
        "steps": steps,
        "batch": BATCH,
        "seen": seen,
        "by_heart": seen > 10 * SEEN,
        "ema": ema_for(steps),
        "jumping": jumping(jumps, steps, None if many else found["count"]) if jumps else None,
        "output": f"runs/{name}-{chosen.name}" + (f"-{jumps}-steps" if jumps else ""),
    }
    recipe = Recipe.model_validate(yaml.safe_load(_render(facts | {"fit": None})))
    if jumps:
        check_jumps(opened, recipe.stages[1], f"--jumps {jumps}: stages.1")
    run = Run(recipe, runtime)
    fit = fit_to(run, budget or device_memory(runtime.torch_device))
    # A run takes the largest micro-batch that fits the device; it must be told only of another budget.
    flags = (f" --micro-batch {fit.micro_batch}" if budget else "") + fit.flags
    known = {
        "fit": fit,
        "flags": flags,
        "fitted_on": samples_for(*run.latent_size),
        "device": runtime.torch_device.type,
    }
    return _render(facts | known)


def ema_for(steps: int) -> float:
    """Returns the decay of an average over about the last fifth of the steps."""
    return float(f"{1 - 5 / steps:.4f}")


def jumping(jumps: int, steps: int, samples: int | None) -> dict[str, Any]:
    """Returns the settings of the stage that teaches a student to draw in `jumps` steps, in the proportions of the
    recipe bk-tiny-few-steps: 2/5 of the steps before, and paths of about 24 steps of the teacher. Few paths would be
    learned by heart, so each caption has several; `samples`: captions, None if there may be many.
    """
    after = 2 * steps // 5
    return {
        "jumps": jumps,
        "path_steps": jumps * max(1, PATH_STEPS // jumps),
        "paths": min(max(PATHS[0], 4 * samples), PATHS[1]) if samples else PATHS[1],
        "steps": after,
        "ema": ema_for(after),
    }


def _render(facts: dict[str, Any]) -> str:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("prunet.runs", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"quoted": _quoted, "line": one_line}
    return env.get_template("recipe.yaml.j2").render(**facts)


def _quoted(value: Any) -> str:
    """Writes a value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


# -- facts about teacher and data


def license_of(teacher: Teacher) -> str | None:
    """Returns the licence in a teacher's model card or a single file's metadata, if there is one."""
    if teacher.file is not None:
        with safe_open(teacher.file, framework="pt") as file:
            return (file.metadata() or {}).get("modelspec.license")
    card = (teacher.download("README.md") if teacher.hub else teacher.configs()) / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?\n)---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    said = parse_yaml(front[1], str(card)) if front else None
    found = said.get("license_name") or said.get("license") if isinstance(said, dict) else None
    return str(found) if isinstance(found, str) else None


def data_facts(data: str, size: int) -> dict[str, Any]:
    """Counts the samples of data, and looks at the captions of all and at the sizes of the first `LOOKED_AT`.

    Raises:
        UserError: there is nothing to read.
    """
    if Path(data).suffix.lower() in PROMPT_FILES or data in shipped_names(".txt"):
        return {"kind": "prompts", "count": len(read_prompts(data))}
    check_source(data)
    if not has_files(data):
        return {"kind": "source", "count": None}
    captions: list[int] = []
    sides: list[tuple[int, int]] = []
    broken: list[BrokenPicture] = []
    with progress("Looking at the pictures", None) as bar:
        for picture in islice(read_pictures(data), COUNTED):
            captions.append(len(picture.captions))
            if picture.captions and len(sides) < LOOKED_AT:
                try:
                    sides.append(picture.open().size)
                except BrokenPicture as error:
                    broken.append(error)
            bar.advance()
    shorter = [min(pair) for pair in sides]
    return {
        "kind": "source",
        "count": len(captions),
        "or_more": len(captions) == COUNTED,
        "without_caption": captions.count(0),
        "captions": max(captions),
        "broken": broken,
        "looked_at": len(sides) + len(broken),
        "smallest": min(sides),
        "largest": max(sides),
        "median": round(statistics.median(shorter)),
        "enlarged": sum(side < size for side in shorter),
        "shapes": len({round(width / height, 1) for width, height in sides}),
    }


def usual_stage(plan: Plan, layout: str) -> dict[str, Any]:
    """Returns the settings of the last stage of a shipped recipe with this plan, or else with the usual plan, and the
    steps of all its stages.

    Layers are compared by normalised losses with equal weights, which the shipped recipes, as published, do not have.
    """
    recipes = {name: load_recipe(name) for name in shipped_names(".yaml") if not name.startswith("demo")}
    plain = {name: recipe for name, recipe in recipes.items() if recipe.stages[-1].objective == "distillation"}
    wanted = (plan.remove, load_plan(USUAL_PLAN[layout]).remove)
    name = next(name for remove in wanted for name, recipe in plain.items() if recipe.plan.remove == remove)
    stage = plain[name].stages[-1]
    losses = stage.losses.model_dump(include={"task", "output", "feature", "level"})
    if losses["level"] == "layer":
        # Students of emoji-xl came nearer with these, in the same time: benchmarks/2026-11-28-best.md.
        losses |= {"output": 1.0, "feature": 1.0, "normalize": True}
    return {
        **stage.model_dump(include={"learning_rate", "caption_dropout", "batch_size"}),
        "steps": sum(stage.steps for stage in plain[name].stages),
        "stages": len(plain[name].stages),
        "losses": losses,
        "recipe": name,
    }


# -- memory


def parse_budget(text: str) -> int:
    """Returns nine tenths of the bytes in a text such as 24GB (powers of 1024, like the sizes of GPUs).

    Raises:
        UserError: the text has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(M|G|T)i?B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"--budget {text}: give the memory of the device, such as 24GB")
    return int(0.9 * float(found[1]) * 1024 ** {"M": 2, "G": 3, "T": 4}[found[2].upper()])


def fit_to(run: Run, budget: int) -> Fit:
    """Finds the micro-batch, and the fewest options that save memory, so that a step of the first stage fits `budget`.

    They are chosen by quick sums over shapes, and then checked with `prunet.runs.estimate.memory`.
    """
    options = SAVING.get(run.runtime.torch_device.type, ())
    fits: list[Fit] = []
    for count in range(len(options) + 1):
        fits.append(_fit(run, options[:count], budget))
        if fits[-1].needs <= budget and fits[-1].micro_batch >= ENOUGH:
            break
    good = [fit for fit in fits if fit.needs <= budget] or fits[-1:]
    chosen = max(good, key=lambda fit: (min(fit.micro_batch, ENOUGH), -len(fit.options)))
    looked_at = Run(run.recipe, _runtime(run, chosen.options, chosen.micro_batch), like=run)
    return replace(chosen, needs=sum(memory(looked_at, 1).values()))


def _fit(run: Run, options: tuple[str, ...], budget: int) -> Fit:
    """Returns the largest micro-batch that fits with these options; 1 if none fits."""
    stage, configs = run.recipe.stages[0], (run.derived.teacher_config, run.steps_down[0].student_config)
    divisors = [micro for micro in range(1, stage.batch_size + 1) if stage.batch_size % micro == 0]
    for micro in reversed(divisors):
        runtime = _runtime(run, options, micro)
        needs = sum(training_memory(*configs, run.latent_size, micro, stage, runtime).values())
        if needs <= budget or micro == 1:
            break
    return Fit(micro, options, needs, budget)


def _runtime(run: Run, options: tuple[str, ...], micro_batch: int) -> Runtime:
    chosen: dict[str, Any] = dict.fromkeys(options, True)
    return replace(run.runtime, micro_batch=micro_batch, **chosen)
