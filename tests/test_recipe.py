"""Recipes: what is read, what is refused, and with which words."""

from pathlib import Path

import pytest
import yaml

from prunet import UserError, load_recipe
from prunet.recipe import read_prompts
from prunet.runs import recipe_yaml

GOOD = {
    "teacher": "somewhere",
    "plan": "bk-small",
    "data": {"source": "pictures"},
    "stages": [{"steps": 10}],
    "evaluation": {"prompts": ["a"]},
    "output": "runs/x",
}


def write(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def test_defaults_are_those_of_bk_sdm(tmp_path) -> None:
    stage = load_recipe(write(tmp_path)).stages[0]
    assert (stage.learning_rate, stage.weight_decay, stage.max_grad_norm, stage.batch_size) == (5e-5, 1e-2, 1.0, 256)
    assert (stage.losses.task, stage.losses.output, stage.losses.feature) == (1, 1, 1)


def test_set_reaches_everywhere(tmp_path) -> None:
    sets = ["stages.0.steps=7", "teacher.config=c", "data.size=64", "stages.0.losses.feature=0.5", "plan=bk-tiny"]
    recipe = load_recipe(write(tmp_path), sets)
    assert (recipe.stages[0].steps, recipe.data.size, recipe.plan.name) == (7, 64, "bk-tiny")
    assert (recipe.teacher.source, recipe.teacher.config) == ("somewhere", "c")
    assert recipe.stages[0].losses.feature == 0.5


BAD = {
    "unknown key": ({"stagess": []}, "did you mean 'stages'"),
    "unknown key in a stage": ({"stages": [{"steps": 1, "learningrate": 1}]}, "did you mean 'learning_rate'"),
    "unknown key in data": ({"data": {"source": "x", "flp": True}}, "did you mean 'flip'"),
    "unknown key in losses": ({"stages": [{"steps": 1, "losses": {"features": 1}}]}, "did you mean 'feature'"),
    "no stage": ({"stages": []}, "stages"),
    "steps of 0": ({"stages": [{"steps": 0}]}, "stages.0.steps"),
    "negative rate": ({"stages": [{"steps": 1, "learning_rate": -1}]}, "learning_rate"),
    "rate that is not a number": ({"stages": [{"steps": 1, "learning_rate": "fast"}]}, "learning_rate"),
    "no loss": ({"stages": [{"steps": 1, "losses": {"task": 0, "output": 0, "feature": 0}}]}, "above 0"),
    "pictures and prompts": ({"data": {"source": "x", "prompts": ["y"]}}, "either"),
    "crop of prompts": ({"data": {"prompts": ["y"], "crop": "random"}}, "data: 'crop' has no meaning .* are prompts"),
    "flip of prompts": ({"data": {"prompts": ["y"], "flip": True}}, "'flip' has no meaning .* are prompts: leave it"),
    "buckets of prompts": ({"data": {"prompts": ["y"], "buckets": True}}, "'buckets' has no meaning .* are prompts"),
    "steps of pictures": ({"data": {"source": "x", "steps": 5}}, "'steps' has no meaning .* are pictures"),
    "neither": ({"data": {}}, "either"),
    "odd size": ({"data": {"source": "x", "size": 100}}, "multiple of 8"),
    "crop": ({"data": {"source": "x", "crop": "left"}}, "center"),
    "plan": ({"plan": "bk-smal"}, "did you mean 'bk-small'"),
    "plan of numbers": ({"plan": 3}, "preset"),
    "no prompts": ({"evaluation": {"prompts": []}}, "at least one"),
    "no prompts to draw": ({"data": {"prompts": []}}, "data.prompts.*at least one"),
    "dropout": ({"stages": [{"steps": 1, "caption_dropout": 1.5}]}, "caption_dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_is_one_line_that_names_the_key(case: str, tmp_path) -> None:
    changes, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        load_recipe(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_recipe_of_a_run_folder_is_read_again(tmp_path) -> None:
    """It says all values, those too that prompts have no use for."""
    recipe = load_recipe(write(tmp_path, data={"prompts": ["y"], "steps": 5}))
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml").data == recipe.data


def test_missing_key_is_named(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in GOOD.items() if k != "output"}))
    with pytest.raises(UserError, match="'output' is missing"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["[1, 2", "- a", "", "a: b: c"])
def test_what_is_no_yaml_mapping_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("override", ["steps", "=3", "stages.5.steps=3", "stages.0.steps=[1", "output.a=1"])
def test_bad_set_is_refused(override: str, tmp_path) -> None:
    with pytest.raises(UserError):
        load_recipe(write(tmp_path), [override])


def test_prompts_of_a_file(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# held out\na cat\n\n  a dog  \n")
    assert read_prompts(str(path)) == ["a cat", "a dog"]
    with pytest.raises(UserError, match="No prompt file"):
        read_prompts(str(tmp_path / "none.txt"))


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        load_recipe(path)
