"""The files of a search: the plan, and the recipe that makes its student."""

from pathlib import Path
from typing import Any

import yaml

from prunet.disk.files import write_text
from prunet.plan.plan import Plan
from prunet.recipe.paths import in_full
from prunet.recipe.recipe import load_recipe, recipe_yaml
from prunet.search.examples import PROMPTS
from prunet.search.recovery import learning_rate_for, usual_rate
from prunet.search.results import SearchResult
from prunet.search.sensitivity import cache_folder


def write_plan(
    plan: Plan, result: SearchResult, folder: Path, cache: Path | None = None, config: str | None = None
) -> None:
    """Writes `plan.yaml`, `recipe.yaml` and `search.json` into the folder of a search.

    `cache`: the run whose recipe the new one follows, if the search used one. `config`: see `Teacher`.
    """
    chosen = {"description": plan.description, "source": "prunet search", "remove": list(plan.remove)}
    write_text(folder / "plan.yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=1000))
    result.save(folder / "search.json")
    recipe = _recipe(plan, result, folder, cache, config)
    note = (
        "# Distils the plan that prunet search found (plan.yaml): prunet run THIS. See docs/recipes.md for the keys.\n"
    )
    if not result.trained_is_better and result.recover_steps:
        note += (
            f"# In the search {result.recover_steps} steps of training did not improve this student: compare it "
            "with\n# the untrained one, `prunet build TEACHER --plan plan.yaml`.\n"
        )
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)
    write_text(folder / "recipe.yaml", note + text)


def _recipe(plan: Plan, result: SearchResult, folder: Path, cache: Path | None, config: str | None) -> dict[str, Any]:
    """Returns the recipe of the run `cache` with the new plan; without a run, a recipe with a few prompts.

    The learning rate follows from the student's error before training.
    """
    rate = float(f"{learning_rate_for(result.error_before, usual_rate(cache)):.2g}")
    own: dict[str, Any] = {
        "teacher": {"source": in_full(result.teacher), **({"config": in_full(config)} if config else {})},
        "plan": {"name": plan.name, "description": plan.description, "remove": list(plan.remove)},
        "output": str((folder / "run").absolute()),
    }
    if cache is None or not (cache / "recipe.yaml").is_file():
        stage = {"steps": 10_000, "batch_size": 64, "learning_rate": rate, "ema_decay": 0.999}
        data = {"prompts": list(PROMPTS), "images_per_prompt": 16}
        return {**own, "data": data, "stages": [stage], "evaluation": {"prompts": "everyday"}}
    recipe: dict[str, Any] = yaml.safe_load(recipe_yaml(load_recipe(cache / "recipe.yaml")))
    for stage in recipe["stages"]:
        stage.pop("plan", None)
        stage["learning_rate"] = rate
    return recipe | own | {"cache": str(cache_folder(cache).absolute())}
