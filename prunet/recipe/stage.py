"""A stage of a recipe: a piece of training with its objective, plan, teacher and hyperparameters."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from prunet.denoisers.pairs import Level
from prunet.plan.plan import Plan, load_plan, preset_names
from prunet.recipe.paths import PathOrId, located
from prunet.recipe.training import Training
from prunet.recipe.values import Drawing, DrawingSteps, EmbeddedGuidance, GuidanceScales, Part, Positive, Steps, Weight


class TeacherSource(Part):
    """The place of a teacher."""

    source: PathOrId = Field(description="diffusers folder, .safetensors file or hub id")
    config: PathOrId | None = Field(
        default=None, description="for a single file: folder or hub id with configs and tokenizers"
    )
    revision: str | None = Field(default=None, description="for a hub id: a branch, tag or commit")


#: A teacher in a recipe: its source, or a mapping.
TeacherValue = Annotated[
    TeacherSource, BeforeValidator(lambda value: {"source": value} if isinstance(value, str) else value)
]


class Losses(Part):
    """Weights of the three loss terms (arXiv 2305.15798, equation 4), and the details of the feature term."""

    task: Weight = Field(default=1.0, description="weight of the distance from the data's target")
    output: Weight = Field(default=1.0, description="weight of the distance from the teacher's output")
    feature: Weight = Field(default=1.0, description="weight of the distances between features of student and teacher")
    level: Level = Field(default="block", description="which modules are compared: see docs/recipes.md")
    normalize: bool = Field(default=False, description="divide each feature term by the teacher's mean square")
    weights: dict[str, Weight] = Field(
        default={}, max_length=1000, description="maps patterns over the teacher's modules to factors of their terms"
    )

    @model_validator(mode="after")
    def _some(self) -> "Losses":
        if not (self.task or self.output or self.feature):
            raise ValueError("at least one weight must be above 0")
        return self


def _read_plan(value: Any) -> Plan:
    if not isinstance(value, Plan | str | list | Mapping):
        raise ValueError(f"give a preset's name ({', '.join(preset_names())}), a file, or a list of patterns")
    return load_plan(value if value in preset_names() else located(value, may_be_id=True))


def _write_plan(plan: Plan) -> dict[str, Any]:
    return {"name": plan.name, "remove": list(plan.remove)}


#: A plan in a recipe. Input: a preset's name, a file or patterns; output: name and patterns.
PlanValue = Annotated[Any, BeforeValidator(_read_plan), PlainSerializer(_write_plan)]


Objective = Literal["distillation", "guidance", "trajectory"]
#: Maps an objective to the keys that have no meaning for it and are not saved with it.
IDLE: dict[str, tuple[str, ...]] = {
    "distillation": ("objective", "guidance_scale", "jumps", "path_steps", "paths"),
    "guidance": ("min_snr_gamma", "jumps", "path_steps", "paths"),
    "trajectory": ("min_snr_gamma", "losses", "caption_dropout", "random_captions"),
}
#: Keys that are left out where they have their default, so that stages that were trained before they existed keep their
#: fingerprints.
LATER = ("lora", "random_captions")
#: Maps an objective to the keys of `IDLE` that have a meaning if `paths` is given: its inputs are then points of paths.
ON_PATHS: dict[str, tuple[str, ...]] = {
    "distillation": ("guidance_scale", "path_steps", "paths"),
    "guidance": ("path_steps", "paths"),
}
#: Maps an objective to the calls of the teacher per sample.
TEACHER_CALLS = {"distillation": 1, "guidance": 2, "trajectory": 0}
#: Maps an objective to the keys that it requires.
NEEDED: dict[str, tuple[str, ...]] = {
    "distillation": ("guidance_scale",),
    "guidance": ("guidance_scale",),
    "trajectory": ("guidance_scale", "jumps"),
}
#: The sampler that draws in `jumps` steps.
FEW_STEP_SAMPLER = "ddim-trailing"


class Stage(Training):
    """A stage of distillation. Defaults are BK-SDM's, except that its scripts have no warm-up and no caption dropout.

    `settings` leaves out the keys without a meaning for the objective, and the defaults of `LATER`. It also leaves out
    `objective: distillation`, so that stages that were trained before other objectives existed keep their fingerprints.
    """

    objective: Objective = Field(
        default="distillation", description="what the stage minimises: see docs/few-steps.md for the others"
    )
    guidance_scale: GuidanceScales | None = Field(
        default=None,
        description="of the teacher; the student then draws without guidance, except with distillation. With objective "
        "guidance it may be a range, such as [1, 8], and the student then takes the scale as an input",
    )
    jumps: Steps | None = Field(default=None, description="number of steps in which the student learns to draw")
    path_steps: DrawingSteps = Field(default=12, description="steps of the teacher in a path")
    paths: Steps | None = Field(default=None, description="number of the teacher's paths; by default one per sample")
    plan: PlanValue | None = Field(
        default=None, description="an earlier plan that removes less; if not given, the recipe's plan"
    )
    lora: Steps | None = Field(
        default=None,
        description="rank of a LoRA that is trained instead of all weights; the student gets it merged",
    )
    losses: Losses = Field(default=Losses(), description="the terms of the loss")
    random_captions: bool = Field(
        default=False, description="where there is much noise, show captions of other samples (arXiv 2504.02011)"
    )
    teacher: TeacherValue | None = Field(default=None, description="another teacher for this stage, of the same layout")
    min_snr_gamma: Positive | None = Field(
        default=None, description="the task loss is weighed by the signal-to-noise ratio, up to this value; 5 is usual"
    )

    @model_validator(mode="after")
    def _fits_objective(self) -> "Stage":
        name = self.objective
        fields = type(self).model_fields
        if idle := [k for k in IDLE[name] if not self.has(k) and getattr(self, k) != fields[k].default]:
            raise ValueError(f"{idle[0]!r} has no meaning with objective {name}: leave it out")
        if missing := [key for key in NEEDED[name] if self.has(key) and getattr(self, key) is None]:
            raise ValueError(f"objective {name} needs {missing[0]!r}")
        if name == "guidance" and self.losses.task:
            raise ValueError("objective guidance needs 'losses.task' 0, because the data teach the unguided output")
        if name == "distillation" and self.paths and self.losses.task:
            raise ValueError("'paths' need 'losses.task' 0, because guided paths do not lead to the data")
        if self.has("guidance_scale") and isinstance(self.guidance_scale, float) and self.guidance_scale < 1:
            raise ValueError(
                f"'guidance_scale' {self.guidance_scale:g} moves the teacher's output away from the prompt: give 1 for "
                "no guidance, or more"
            )
        if self.guidance_range and (name != "guidance" or self.paths or self.lora):
            raise ValueError(
                "a range of 'guidance_scale' needs objective guidance without 'paths', which are drawn at one scale, "
                "and without 'lora', which has no place for the new layer"
            )
        if self.random_captions and self.losses.task:
            raise ValueError("'random_captions' need 'losses.task' 0, because the data do not show other captions")
        if self.jumps and self.has("path_steps") and self.path_steps % self.jumps:
            raise ValueError(f"'jumps' {self.jumps} must divide 'path_steps' {self.path_steps}")
        return self

    @model_serializer(mode="wrap")
    def _what_has_a_meaning(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = {key for key in LATER if getattr(self, key) == type(self).model_fields[key].default}
        return {key: value for key, value in write(self).items() if self.has(key) and key not in plain}

    def has(self, key: str) -> bool:
        """Returns whether a key has a meaning for the objective."""
        on_paths = self.paths is not None and key in ON_PATHS.get(self.objective, ())
        return on_paths or key not in IDLE[self.objective]

    @property
    def rank(self) -> int | None:
        """The rank of the LoRA that is trained; None: all weights are trained."""
        return self.lora

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The smallest and the largest guidance scale, if the student takes the scale as an input."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else None

    @property
    def fixed_guidance(self) -> float:
        """The teacher's guidance scale; 0 if there is none, or a range."""
        return self.guidance_scale if isinstance(self.guidance_scale, float) else 0.0

    @property
    def teacher_calls(self) -> int:
        """Calls of the teacher per sample."""
        return TEACHER_CALLS[self.objective]

    def made_for(self, evaluation: Drawing) -> Drawing | None:
        """Returns how the stage's student draws; None: like the teacher. `evaluation`: how the teacher draws."""
        if self.jumps:
            return Drawing(steps=self.jumps, guidance_scale=1, sampler=FEW_STEP_SAMPLER)
        if self.guidance_range:
            drawing = evaluation.model_dump(include=set(Drawing.model_fields))
            return EmbeddedGuidance(**drawing, guidance_range=self.guidance_range)
        if self.objective == "guidance":
            return Drawing(steps=evaluation.steps, guidance_scale=1, sampler=evaluation.sampler)
        return None
