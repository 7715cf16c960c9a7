"""The files of a search: the plan, and the recipe that makes its student."""

from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from prunet.disk.files import write_text
from prunet.plan.plan import Plan
from prunet.recipe.paths import in_full
from prunet.recipe.prompts import read_prompt_file
from prunet.recipe.recipe import load_recipe, recipe_yaml
from prunet.search.examples import PROMPTS
from prunet.search.recovery import learning_rate_for, usual_rate
from prunet.search.results import SearchResult
from prunet.search.sensitivity import cache_folder

#: Pictures that the recipe's teacher draws from few prompts.
LEAST_PICTURES = 256


def write_plan(
    plan: Plan,
    result: SearchResult,
    folder: Path,
    *,
    cache: Path | None = None,
    prompts: Path | None = None,
    config: str | None = None,
) -> None:
    """Writes `plan.yaml`, `search.json` and, if prunet can train the student, `recipe.yaml` into a search's folder.

    `cache`: the run whose recipe the new one follows, if the search used one. `prompts`: the file of prompts to learn
    from otherwise. `config`: see `Teacher`.
    """
    chosen = {"description": plan.description, "source": "prunet search", "remove": list(plan.remove)}
    write_text(folder / "plan.yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=1000))
    result.save(folder / "search.json")
    if not result.is_trainable:
        return
    run = cache if cache is not None and (cache / "recipe.yaml").is_file() else None
    recipe = _recipe(plan, result, folder, run, prompts, config)
    note = (
        "# Distils the plan that prunet search found (plan.yaml): prunet run THIS. See docs/recipes.md for the keys.\n"
    )
    if not result.trained_is_better and result.recover_steps:
        note += (
            f"# In the search {result.recover_steps} steps of training did not improve this student: compare it "
            "with\n# the untrained one, `prunet build TEACHER --plan plan.yaml`.\n"
        )
    if run is None and prompts is None:
        note += (
            "# Its data are a few prompts of prunet's own, so the student forgets what they do not ask for: give your\n"
            "# pictures with captions, or your prompts.\n"
        )
        if cache is not None:
            note += f"# The data of the cache {cache} are not known here: give what it was made from.\n"
    note += "".join(f"# {line}\n" for warning in result.warnings for line in wrap(warning, 110))
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)
    write_text(folder / "recipe.yaml", note + text)


def _recipe(
    plan: Plan, result: SearchResult, folder: Path, run: Path | None, prompts: Path | None, config: str | None
) -> dict[str, Any]:
    """Returns the recipe of `run` with the new plan; without a run, a recipe with `prompts`, or with a few prompts.

    The learning rates are lowered by `learning_rate_for`, for the student's error before training.
    """

    def lowered(rate: float) -> float:
        return float(f"{min(rate, learning_rate_for(result.error_before, rate)):.2g}")

    own: dict[str, Any] = {
        "teacher": {"source": in_full(result.teacher), **({"config": in_full(config)} if config else {})},
        "plan": {"name": plan.name, "description": plan.description, "remove": list(plan.remove)},
        "output": str((folder / "run").absolute()),
    }
    if run is None:
        stage = {"steps": 10_000, "batch_size": 64, "learning_rate": lowered(usual_rate(None)), "ema_decay": 0.999}
        count = len(read_prompt_file(prompts) if prompts else PROMPTS)
        data = {
            "prompts": in_full(str(prompts)) if prompts else list(PROMPTS),
            "images_per_prompt": max(1, LEAST_PICTURES // count),
        }
        return {**own, "data": data, "stages": [stage], "evaluation": {"prompts": "everyday"}}
    recipe: dict[str, Any] = yaml.safe_load(recipe_yaml(load_recipe(run / "recipe.yaml")))
    for stage in recipe["stages"]:
        stage.pop("plan", None)
        stage["learning_rate"] = lowered(stage["learning_rate"])
    return recipe | own | {"cache": str(cache_folder(run).absolute())}
