"""The recipe: one YAML page with teacher, plan, data, stages and evaluation.

Device, precision, micro-batch and the number of processes are options of the command line, because results do not
depend on them.
"""

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from prunet.disk.reading import DEEPEST, load_mapping, parse_yaml
from prunet.errors import UserError
from prunet.hashing import json_hash
from prunet.plan.plan import Plan
from prunet.recipe.paths import SHIPPED, PathOrId, PathText, PromptsText, from_folder, moved, shipped_names, shipped_or
from prunet.recipe.prompts import check_prompts, read_prompt_file
from prunet.recipe.stage import Losses, PlanValue, Stage, TeacherSource, TeacherValue
from prunet.recipe.values import Copies, Drawing, DrawingSteps, Integer, Part, Seed, Size, Steps, Weight

#: Keys of `Data` for pictures only, and keys for prompts only.
OF_PICTURES = ("crop", "flip", "buckets", "views", "image_column", "caption_column")
OF_PROMPTS = ("steps", "guidance_scale", "images_per_prompt")


def _not_empty(value: str | list[str] | None) -> str | list[str] | None:
    if value is not None and not value:
        raise ValueError("give at least one prompt")
    return value


class Data(Part):
    """Training data: pictures with captions (`source`), or `prompts` that the teacher draws itself."""

    source: PathOrId | list[PathOrId] | None = Field(
        default=None, description="folder, saved dataset, tar shards or parquet (or their URLs), or datasets id"
    )
    prompts: PromptsText | list[str] | None = Field(
        default=None, description="a list, a text file with one prompt per line, or the name of a shipped list"
    )
    size: Size | None = Field(None, description="pixels; if not given, the teacher's native size")
    crop: Literal["center", "random"] = Field(
        default="center", description="where pictures of other shapes are cropped"
    )
    flip: bool = Field(default=False, description="mirror half of the pictures")
    buckets: bool = Field(default=False, description="crop each picture to the nearest of several shapes of one area")
    views: Copies = Field(default=1, description="samples of each picture, with different crops, flips and captions")
    limit: Steps | None = Field(default=None, description="use only the first N pictures or prompts")
    image_column: str = Field(default="image", description="column of a list of captions, parquet or a dataset")
    text: Literal["cached", "live"] = Field(
        default="cached", description="live: embed captions while training, if their embeddings take too much disk"
    )
    caption_column: str | None = Field(
        default=None, description="if not given, the first of text, caption, captions, prompt, description, sentences"
    )
    steps: DrawingSteps = Field(default=25, description="prompts only: steps of the sampler, dpmsolver++")
    guidance_scale: Weight = Field(default=7.5, description="prompts only: guidance scale of the teacher")
    images_per_prompt: Copies = Field(
        default=1, description="prompts only: latents of each prompt, from different noise"
    )

    _some_prompts = field_validator("prompts")(_not_empty)

    @model_validator(mode="after")
    def _one_of(self) -> "Data":
        if (self.source is None) == (self.prompts is None):
            raise ValueError("give either 'source' (pictures with captions) or 'prompts'")
        kind, names = ("pictures", OF_PROMPTS) if self.source is not None else ("prompts", OF_PICTURES)
        # Default values are allowed, because the recipe.yaml of a run folder contains all values.
        if idle := [name for name in names if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"{idle[0]!r} has no meaning if the data are {kind}: leave it out")
        if self.size is not None and self.size % 8:
            raise ValueError(f"'size' must be a multiple of 8, not {self.size}")
        return self


class Sheet(Part):
    """The sheet of pictures drawn during training: teacher and student, with fixed prompts and fixed noise."""

    prompts: list[str] | None = Field(default=None, description="if not given, the first evaluation prompts")
    every: Annotated[Integer, Field(ge=0)] = Field(default=1000, description="steps between two sheets; 0: no sheets")


class Evaluation(Drawing):
    """How teacher and student draw for the evaluation; a student's last stage may decide otherwise (`made_for`)."""

    prompts: PromptsText | list[str] = Field(
        description="held-out prompts: a list, a text file with one per line, or the name of a shipped list"
    )
    limit: Steps | None = Field(default=None, description="use only the first N prompts")
    seed: Seed = Field(default=1234, description="seed of the pictures' noise; independent of the run's seed")
    image_to_image: Annotated[Integer, Field(ge=0, le=1000)] = Field(
        default=4, description="number of the teacher's pictures that teacher and student draw from; 0: none"
    )

    _some_prompts = field_validator("prompts")(_not_empty)


class Export(Part):
    """The files that are written beside the stock pipeline folder."""

    fp16: bool = Field(default=False, description="also write the fp16 variant into the folder; single file in fp16")
    single_file: bool = Field(default=False, description="also write the original LDM layout as one file")
    license: str | None = Field(default=None, description="the student's licence, usually that of the teacher")


class Recipe(Part):
    """Everything that decides a student: one YAML page (docs/recipes.md)."""

    teacher: TeacherValue = Field(description="the original model: its source, or a mapping")
    plan: PlanValue = Field(description="the blocks to remove: a preset's name, a file, or a list of patterns")
    initialisation: Literal["inherited", "fitted", "random"] = Field(
        default="inherited", description="the student's first weights: the teacher's; fitted to it; or random"
    )
    data: Data = Field(description="the training data")
    stages: Annotated[list[Stage], Field(min_length=1, max_length=100)] = Field(
        description="pieces of training, one after another"
    )
    evaluation: Evaluation = Field(description="how the student is compared with its teacher")
    sheet: Sheet = Field(default=Sheet(), description="pictures drawn during training")
    export: Export = Field(default=Export(), description="files beside the pipeline folder")
    output: PathText = Field(description="the run folder")
    cache: PathText | None = Field(
        default=None, description="folder for the latents, to share them between runs; if not given, in the run folder"
    )
    seed: Seed = Field(default=1234, description="seed of training; pictures have `evaluation.seed`")
    checkpoint_every: Steps = Field(default=1000, description="steps between two checkpoints")
    keep_checkpoints: Steps = Field(default=2, description="number of checkpoints to keep, the newest ones")

    @model_validator(mode="after")
    def _last_plan(self) -> "Recipe":
        if self.stage_plans[-1].remove != self.plan.remove:
            raise ValueError("the last stage must train the recipe's own plan: leave its 'plan' out")
        return self

    @model_validator(mode="after")
    def _text_of_paths(self) -> "Recipe":
        on_paths = next((number for number, stage in enumerate(self.stages) if stage.has("paths")), None)
        if self.data.text == "live" and on_paths is not None:
            raise ValueError(f"'data.text' live: not with stages.{on_paths}, whose paths are cached with their text")
        if self.data.text == "live" and any(stage.random_captions for stage in self.stages):
            raise ValueError("'data.text' live: not with 'random_captions', which read cached text")
        return self

    @model_validator(mode="after")
    def _embedded_guidance(self) -> "Recipe":
        embeds = [stage.guidance_range is not None for stage in self.stages]
        if embeds != sorted(embeds):
            raise ValueError(
                f"stages.{embeds.index(True)} has a range of 'guidance_scale', which the student then takes as an "
                "input: later stages need a range too"
            )
        try:
            _ = self.made_for
        except ValidationError as error:
            raise ValueError(f"evaluation: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        if self.export.single_file and embeds[-1]:
            raise ValueError(
                "'export.single_file': the layout has no name for the weights that take the guidance scale: leave it "
                "out"
            )
        return self

    @property
    def made_for(self) -> Drawing | None:
        """How the student of the last stage draws; None: in the same way as the teacher."""
        return self.stages[-1].made_for(self.evaluation)

    @property
    def stage_plans(self) -> list[Plan]:
        """The plan of each stage."""
        return [stage.plan or self.plan for stage in self.stages]

    def fingerprint(self, *parts: str, extra: Any = None) -> str:
        """A hash of the named parts of the recipe, and of `extra` plain data."""
        chosen = {p: self.plan.fingerprint if p == "plan" else _plain(getattr(self, p)) for p in parts}
        chosen |= {"": extra} if extra else {}
        return json_hash(chosen, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(v) for v in value] if isinstance(value, list) else value


def load_recipe(path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a YAML recipe from a file, or a shipped one by its name.

    Paths in a recipe are relative to its folder (`folder_of`). If a run was moved, paths in its own recipe that moved
    with it are found at their new place.

    Args:
        path: the recipe's file, or a name.
        overrides: `key.sub=value` strings (`stages.0.steps=100`) in YAML, with paths relative to the current folder.
        values: keys and parsed values that replace the recipe's, before `overrides` do.

    Raises:
        UserError: the file is not readable, a key is unknown (with the nearest known one), or a value does not fit.
    """
    path = shipped_or(path, ".yaml")
    if not path.is_file():
        raise UserError(
            f"No recipe at {path}: give a YAML file (`prunet new` writes one), a run folder, or the name of a shipped "
            f"recipe ({', '.join(shipped_names('.yaml'))})"
        )
    value = load_mapping(path, "a recipe")
    if _is_of_run(path) and isinstance(old := value.get("output"), str) and os.path.isabs(old):
        value = moved(value, old, str(path.parent))
    value = from_folder(value, folder_of(path))
    for key, new in (values or {}).items():
        _override(value, key, copy.deepcopy(new), repr(key))
    parsed = [_parse_override(override) for override in overrides]
    keys = [key for key, _, _ in parsed]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--set: key {twice!r} is given twice")
    for override in parsed:
        _override(value, *override)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from error
    if path.parent == SHIPPED and recipe.teacher.source.startswith("emoji/") and not Path("emoji").is_dir():
        raise UserError(
            f"recipe {path.stem}: its teacher and pictures lie in emoji/ of prunet's repository, not in the package: "
            "clone it (git clone --depth 1) and run this command in its folder; for your own model, use `prunet new`"
        )
    return recipe


def folder_of(path: Path) -> str:
    """Returns the folder that the paths of a recipe are relative to, usually its own; "" is the current folder.

    Paths of a shipped recipe are relative to the current folder, because nothing may be written where prunet is
    installed. So are those of a run's own `recipe.yaml`: `recipe_yaml` writes absolute paths, and older versions wrote
    them as they were in the command.
    """
    return "" if _is_of_run(path) or path.parent.resolve() == SHIPPED.resolve() else str(path.parent)


def _is_of_run(path: Path) -> bool:
    return path.name == "recipe.yaml" and (path.parent / "plan.json").is_file()


def recipe_yaml(recipe: Recipe) -> str:
    """Returns the recipe as YAML for `load_recipe`, with all its values and absolute paths."""
    return yaml.safe_dump(recipe.model_dump(mode="json", context="full"), sort_keys=False, allow_unicode=True)


def _parse_override(text: str) -> tuple[str, Any, str]:
    """Returns key and value of a `--set`, and its name in messages."""
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text!r}: write key=value, such as stages.0.steps=100")
    return key.strip(), from_folder(parse_yaml(raw, f"--set {text!r}"), ""), f"--set {text!r}"


def _override(value: Any, key: str, new: Any, name: str) -> None:
    *parents, last = key.strip().split(".")
    if len(parents) > DEEPEST:
        raise UserError(f"{name}: a key with more than {DEEPEST} parts: give a key of the recipe")
    for parent in parents:
        if isinstance(value, list) and parent in _places(value):
            value = value[int(parent)]
        elif isinstance(value, dict):
            if isinstance(value.get(parent), str) and parent == "teacher":
                value[parent] = {"source": value[parent]}
            value = value.setdefault(parent, {})
        else:
            raise UserError(f"{name}: the recipe has no {parent!r} at that place")
    if isinstance(value, list) and last in _places(value):
        value[int(last)] = new
    elif isinstance(value, dict):
        value[last] = new
    else:
        raise UserError(f"{name}: the recipe has no {last!r} at that place")


def _places(value: list[Any]) -> list[str]:
    return [str(i) for i in range(len(value))]


_PARTS: dict[str, type[Part]] = {
    "teacher": TeacherSource,
    "data": Data,
    "stages": Stage,
    "losses": Losses,
    "sheet": Sheet,
    "evaluation": Evaluation,
    "export": Export,
}


def explain(error: ValidationError, whole: type[Part] = Recipe) -> str:
    """Returns pydantic's first error as one line with its key, and for an unknown key the nearest known one."""
    first = error.errors()[0]
    # If a value may have several types, pydantic adds the type that it tried, in its own words.
    where = ".".join(str(name) for name in first["loc"] if not re.search(r"[-\[(]", str(name)))
    if first["type"] == "extra_forbidden":
        parents = [str(p) for p in first["loc"][:-1] if not isinstance(p, int)]
        known = list((_PARTS.get(parents[-1], whole) if parents else whole).model_fields)
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, known, 1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
    if first["type"] == "missing":
        return f"{where!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def read_prompts(value: str | list[str], limit: int | None = None) -> list[str]:
    """Returns the first `limit` prompts of a list, a file (`prunet.recipe.prompts`) or a shipped list."""
    if isinstance(value, str):
        return read_prompt_file(shipped_or(value, ".txt"))[:limit]
    check_prompts(value[:limit], "prompts")
    return value[:limit]
