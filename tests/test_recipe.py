"""Recipes: what is read, what is refused, and with which words."""

import re
from pathlib import Path

import pytest
import yaml

from prunet import UserError, load_recipe
from prunet.recipe.recipe import Data, Evaluation, Export, Recipe, Sheet, read_prompts, recipe_yaml
from prunet.recipe.stage import Losses, Stage, TeacherSource

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
    "live text of paths": (
        {
            "data": {"source": "x", "text": "live"},
            "stages": [{"steps": 1, "objective": "trajectory", "guidance_scale": 2, "jumps": 2}],
        },
        r"data\.text.*stages\.0",
    ),
    "live text of others": (
        {
            "data": {"source": "x", "text": "live"},
            "stages": [{"steps": 1, "random_captions": True, "losses": {"task": 0}}],
        },
        r"data\.text.*random_captions",
    ),
    "captions of others for data": ({"stages": [{"steps": 1, "random_captions": True}]}, r"losses\.task' 0"),
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
    path.write_text("a cat\n" + "a dog " * 2000)
    for prompts in (str(path), ["a cat", "a dog " * 2000]):
        with pytest.raises(UserError, match=r"a prompt of 1[12],\d+ characters"):
            read_prompts(prompts)


def test_the_page_of_the_docs_is_a_recipe_with_every_key() -> None:
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    page = text.split("```yaml\n")[1].split("```")[0]
    assert Recipe.model_validate(yaml.safe_load(page)).stages[0].steps == 50000
    value = yaml.safe_load(re.sub(r"(?m)^( +)# (?=\w+:)", r"\1", page))  # with the keys of other choices
    stage = value["stages"][0]
    for kind, keys in (
        (Recipe, value),
        (TeacherSource, value["teacher"]),
        (Data, value["data"]),
        (Stage, stage),
        (Losses, stage["losses"]),
        (Sheet, value["sheet"]),
        (Evaluation, value["evaluation"]),
        (Export, value["export"]),
    ):
        assert set(keys) == set(kind.model_fields)


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parent.parent / "prunet" / "recipe" / "shipped").glob("*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        load_recipe(path)


def test_paths_begin_at_the_recipes_folder_and_those_of_set_at_the_current_one(tmp_path, monkeypatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (home / "pictures", home / "emoji" / "sd", here):
        folder.mkdir(parents=True)
    (home / "plan.yaml").write_text("remove: [mid_block]\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("DISK", "/big")
    path = write(
        home,
        teacher="emoji/sd",
        plan="plan.yaml",
        data={"source": ["pictures/*.tar", "~/x"]},
        evaluation={"prompts": "everyday"},
        output="$DISK/run",
        cache="runs/../latents",
        stages=[{"steps": 1, "teacher": "owner/name"}],
    )
    recipe = load_recipe(Path("..") / "home" / path.name, ["sheet.every=1"])
    assert (recipe.teacher.source, recipe.stages[0].teacher.source) == ("../home/emoji/sd", "owner/name")
    assert recipe.data.source == ["../home/pictures/*.tar", str(Path.home() / "x")]
    assert (recipe.plan.remove, recipe.output) == (("mid_block",), "/big/run")
    assert len(read_prompts(recipe.evaluation.prompts)) > 10 and recipe.cache == "../home/runs/../latents"
    assert load_recipe(path, ["output=there", "data={source: other}"]).output == "there"
    written = yaml.safe_load(recipe_yaml(recipe))  # what a run keeps can be read from anywhere
    assert written["teacher"]["source"] == str(home / "emoji" / "sd") and written["cache"] == str(home / "latents")
    assert written["stages"][0]["teacher"]["source"] == "owner/name" and written["evaluation"]["prompts"] == "everyday"
    assert load_recipe(home / path.name, ["output=there"]).data.source == [
        f"{home}/pictures/*.tar",
        recipe.data.source[1],
    ]


def test_a_path_as_older_versions_meant_it_is_told_in_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "runs" / "x").mkdir(parents=True)
    path = write(tmp_path / "recipes", output="runs/x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/x: .* are relative to its folder, .*recipes, .*: write \.\./runs/x$"):
        load_recipe(path)
    assert load_recipe(path, ["output=runs/x"]).output == "runs/x"
    (tmp_path / "recipes" / "plan.json").touch()  # a run's own recipe, which an older version wrote
    assert load_recipe(path).output == "runs/x"


def test_an_environment_variable_that_is_not_set_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(UserError, match=r"variable \$\{NO_SUCH\} is not set"):
        load_recipe(write(tmp_path, output="${NO_SUCH}/run"))


def test_the_demo_says_that_it_needs_a_clone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"recipe demo: .*git clone"):
        load_recipe("demo")
    with pytest.raises(UserError, match=r"No recipe at dem: .*bk-base-sd-v1\.4.*, demo, "):
        load_recipe("dem")
    assert load_recipe("bk-small-sd-v1.4").output == "runs/bk-small-sd-v1.4"


SHIPPED = Path(__file__).parent.parent / "prunet" / "recipe" / "shipped"
#: scripts/kd_train.sh, scripts/kd_train_v2-base-im512.sh and MODEL_CARD.md of Nota-NetsPresso/BK-SDM.
BK_SDM = {
    "sd-v1.4": {"teacher": "CompVis/stable-diffusion-v1-4", "batch_size": 64 * 4},
    "sd-v2.1-base": {"teacher": "stabilityai/stable-diffusion-2-1-base", "batch_size": 32 * 4},
}


@pytest.mark.parametrize("teacher", BK_SDM)
@pytest.mark.parametrize("size", ["base", "small", "tiny"])
def test_recipes_of_bk_sdm_are_as_published(size: str, teacher: str) -> None:
    recipe, published = load_recipe(SHIPPED / f"bk-{size}-{teacher}.yaml"), BK_SDM[teacher]
    (stage,) = recipe.stages
    assert (recipe.teacher.source, recipe.plan.name) == (published["teacher"], f"bk-{size}")
    assert (recipe.data.size, recipe.data.crop, recipe.data.flip) == (512, "center", True)
    assert (stage.steps, stage.batch_size) == (50_000, published["batch_size"])
    assert (stage.learning_rate, stage.schedule, stage.warmup_steps) == (5e-5, "constant", 0)
    assert (stage.weight_decay, stage.max_grad_norm, stage.ema_decay) == (1e-2, 1.0, 0.9999)
    assert (stage.losses.task, stage.losses.output, stage.losses.feature) == (1, 1, 1)
    assert (recipe.evaluation.sampler, recipe.evaluation.steps, recipe.seed) == ("pndm", 25, 1234)


def test_recipes_of_segmind_are_as_published() -> None:
    """README.md and distill_sdxl.py of segmind/SSD-1B."""
    for name, steps in (("ssd-1b", 251_000), ("vega", None)):
        recipe = load_recipe(SHIPPED / f"{name}.yaml")
        assert steps in (None, sum(stage.steps for stage in recipe.stages))
        assert (recipe.data.size, recipe.data.crop) == (1024, "random")
        for stage in recipe.stages:
            assert (stage.batch_size, stage.learning_rate, stage.warmup_steps) == (32 * 4, 1e-5, 0)
            assert (stage.ema_decay, stage.losses.level) == (None, "layer")
            assert (stage.losses.task, stage.losses.output, stage.losses.feature) == (1, 0.5, 0.5)


def test_each_number_of_a_published_recipe_says_where_it_is_from() -> None:
    for path in sorted(set(SHIPPED.glob("*.yaml")) - set(SHIPPED.glob("demo*.yaml"))):
        text = path.read_text()
        sources = re.findall(r"^#   (\w+)  +\S", text, re.M)
        assert {"prunet"} < set(sources), path.name
        for line in text.splitlines():
            setting = re.match(r"[\s-]+(\w+): *(?P<value>[^#]*)(?P<comment>#.*)?$", line)
            if (
                setting
                and re.search(r"\d|true|false|null|center|random", setting["value"])
                and setting[1] not in ("fp16", "plan")
            ):
                assert any(f" {source}" in (setting["comment"] or "") for source in sources), f"{path.name}: {line}"
