"""What a search leaves: the plan as a file, and the recipe that makes its student."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunet.disk.files import write_json, write_text
from prunet.plan.plan import Plan
from prunet.recipe.recipe import load_recipe
from prunet.recipe.stage import Stage
from prunet.search.examples import PROMPTS
from prunet.search.recovery import learning_rate_for, usual_rate
from prunet.search.sensitivity import cache_folder


def write_plan(
    plan: Plan, result: Mapping[str, Any], folder: Path, cache: Path | None = None, config: str | None = None
) -> None:
    """Writes `plan.yaml`, `recipe.yaml` and `search.json` into the folder of a search.

    `cache`: the run whose recipe the new one follows, if the search used one. `config`: see `Teacher`.
    """
    chosen = {"description": plan.description, "source": "prunet search", "remove": list(plan.remove)}
    write_text(folder / "plan.yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=1000))
    write_json(folder / "search.json", dict(result))
    recipe = _recipe(plan, result, folder, cache, config)
    note = (
        "# Distils the plan that prunet search found (plan.yaml): prunet run THIS. See docs/recipes.md for the keys.\n"
    )
    if not result["trained_is_better"] and result["recover_steps"]:
        note += (
            f"# In the search {result['recover_steps']} steps of training did not improve this student: compare it "
            "with\n# the untrained one, `prunet build TEACHER --plan plan.yaml`.\n"
        )
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)
    write_text(folder / "recipe.yaml", note + text)


def _recipe(
    plan: Plan, result: Mapping[str, Any], folder: Path, cache: Path | None, config: str | None
) -> dict[str, Any]:
    """That of the run that `cache` is, with the plan in place of its own; else one with few prompts, to be extended.

    The learning rate follows from the student's error before training.
    """
    run = cache is not None and (cache / "recipe.yaml").is_file()
    rate = float(f"{learning_rate_for(result['error_before'], usual_rate(cache)):.2g}")
    own: dict[str, Any] = {
        "teacher": {"source": _place(result["teacher"]), **({"config": _place(config)} if config else {})},
        "plan": {"name": plan.name, "description": plan.description, "remove": list(plan.remove)},
        "output": str((folder / "run").absolute()),
    }
    if not run or cache is None:
        stage = {"steps": 10_000, "batch_size": 64, "learning_rate": rate, "ema_decay": 0.999}
        return {
            **own,
            "data": {"prompts": list(PROMPTS), "images_per_prompt": 16},
            "stages": [stage],
            "evaluation": {"prompts": list(PROMPTS)},
        }
    recipe = load_recipe(cache / "recipe.yaml").model_dump(mode="json", exclude_unset=True)
    stages = [Stage.model_validate(stage).settings("plan") | {"learning_rate": rate} for stage in recipe["stages"]]
    data = {key: _place(value) if key in ("source", "prompts") else value for key, value in recipe["data"].items()}
    evaluation = recipe["evaluation"] | {"prompts": _place(recipe["evaluation"]["prompts"])}
    own |= {"data": data, "stages": stages, "evaluation": evaluation, "cache": str(cache_folder(cache).absolute())}
    return recipe | own


def _place(value: Any) -> Any:
    """A path that exists as an absolute one, which means the same wherever the recipe lies; anything else as it is."""
    if isinstance(value, list):
        return [_place(one) for one in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
