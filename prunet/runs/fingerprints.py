"""Hashes of everything that each step of a run depends on; they include the hashes of the steps that it reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet.data.encoding import cache_spec
from prunet.data.paths import paths_spec
from prunet.hashing import json_hash
from prunet.recipe.recipe import Evaluation, read_prompts
from prunet.sampling.paths import schedule_of
from prunet.teacher.teacher import Teacher
from prunet.training.checkpoints import PACE
from prunet.words import short

if TYPE_CHECKING:
    from prunet.runs.run import Run

#: The setting of a stage's label that labels of older versions lack.
SCHEDULE = "noise schedule"


def step_inputs(this: "Run") -> dict[str, str]:
    """Returns for each step a hash of everything that its result depends on."""
    recipe = this.recipe
    begins: list[Any] = [] if recipe.initialisation == "inherited" else [recipe.initialisation, recipe.seed]
    if recipe.initialisation == "fitted":
        begins += [this.cache_specs[0][1], this.teachers[0].fingerprint(["unet"]), schedule_of(this.teachers[0])]
    more = ["guidance as an input"] if this.derived.form.new else []
    build = _hash(this.teacher.fingerprint(["unet"]), recipe.plan.fingerprint, *begins, *more)
    out = {
        "plan": _hash(this.teacher.unet_config, recipe.plan.fingerprint, *more),
        "build": build,
        "cache": _hash([spec for _, spec in [*this.cache_specs, *this.path_specs.values()]]),
    }
    # These decide how the teacher is called and what stages minimise: prediction type, noise schedule, U-Net's config.
    last = _hash(build, this.teacher.unet_config, _scheduler(this.teacher))
    for number, stage in enumerate(recipe.stages, 1):
        settings = (
            stage.settings("teacher"),
            this.teachers[number - 1].fingerprint(["unet"]),
        )
        last = out[f"stage-{number}"] = _hash(last, this.cache_specs[number - 1][1], settings, recipe.seed)
    prompts = read_prompts(recipe.evaluation.prompts, recipe.evaluation.limit)
    evaluation = recipe.evaluation.model_dump(mode="json", exclude={"prompts", "limit", "seed"})
    if evaluation["image_to_image"] == Evaluation.model_fields["image_to_image"].default:
        del evaluation["image_to_image"]  # so that runs evaluated before this key existed are not drawn again
    out["evaluate"] = _hash(last, prompts, evaluation, recipe.evaluation.seed, this.size)
    out["export"] = _hash(out["evaluate"], recipe.export.model_dump(mode="json"), this.teachers[-1].fingerprint())
    out["report"] = _hash(out["export"])
    return out


def _scheduler(teacher: Teacher) -> dict[str, Any]:
    """Returns the config of a teacher's scheduler, the same in each process.

    diffusers notes the fields that the file lacks in the order of a set, which each process has in another order.
    """
    config = dict(teacher.noise_scheduler.config)
    noted = "_use_default_values"
    return config | {noted: sorted(config[noted])} if noted in config else config


def stage_label(this: "Run", number: int) -> dict[str, Any]:
    """Returns everything that a stage's checkpoints depend on: student, cache, seed, and its settings except the pace.

    `inputs` is the hash of all but the noise schedule, which labels of older versions lack; `settings` are the values
    that a message names if something differs.
    """
    recipe, teacher, spec = this.recipe, this.teachers[number - 1], this.cache_specs[number - 1][1]
    settings = recipe.stages[number - 1].settings("teacher", *PACE)
    before = this.inputs["build" if number == 1 else f"stage-{number - 1}"]
    inputs = _hash(before, (spec, teacher.fingerprint(["unet"])), settings, recipe.seed)
    earlier = [stage.settings("teacher") for stage in recipe.stages[: number - 1]]
    stages = [{key: value for key, value in stage.items() if key != "plan"} for stage in (*earlier, settings)]
    return {
        "inputs": inputs,
        "settings": {
            "seed": recipe.seed,
            "stages": stages,
            **spec_settings(spec),
            "initialisation": recipe.initialisation,
            "plan": _named(recipe.plan.name, recipe.plan.fingerprint),
            "plans": [_named(plan.name, plan.fingerprint) for plan in recipe.stage_plans[:number]],
            "U-Net": _named(this.teacher.source, this.teacher.fingerprint(["unet"])),
            "U-Nets": [_named(used.source, used.fingerprint(["unet"])) for used in this.teachers[:number]],
            SCHEDULE: schedule_of(teacher),
        },
    }


def _named(name: str, fingerprint: str) -> str:
    return f"{short(name)} ({fingerprint})"


def spec_settings(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns a cache's spec with the names that messages use."""
    names = {"data": "data", "seed": "seed", "content": "files or prompts of the data", "parts": "teacher"}
    return {name: spec[key] for key, name in names.items()} | {key: spec[key] for key in spec if key not in names}


def stage_caches(this: "Run") -> list[tuple[Path, dict[str, Any]]]:
    """Returns folder and spec of the cache of each stage; teachers that encode in the same way share one."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for number, teacher in enumerate(this.teachers, 1):
        spec = cache_spec(teacher, this.recipe.data, this.recipe.seed, this.cache_folder)
        own = Path(f"{this.cache_folder}-{number}") if found else this.cache_folder
        found.append(next((other for other in found if other[1] == spec), (own, spec)))
    return found


def stage_paths(this: "Run") -> dict[int, tuple[Path, dict[str, Any]]]:
    """Returns folder and spec of the paths of each stage that has any, by its number; equal paths are shared."""
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for number, stage in enumerate(this.recipe.stages, 1):
        if stage.has("paths"):
            spec = paths_spec(this.teachers[number - 1], this.cache_specs[number - 1][1], stage)
            own = Path(f"{this.cache_folder}-paths" + (f"-{number}" if found else ""))
            found[number] = next((other for other in found.values() if other[1] == spec), (own, spec))
    return found


def _hash(*values: Any) -> str:
    return json_hash(values, sort_keys=True, default=str)
