"""The settings of a personalisation: the model, a few pictures of a subject, and the training on them."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, model_validator

from prunet.errors import UserError
from prunet.recipe.paths import PathOrId, PathText
from prunet.recipe.recipe import explain
from prunet.recipe.training import Training
from prunet.recipe.values import Fraction, Integer, Number, Positive, Seed, Size, Steps, Weight

#: Fields that do not change what is learned: paths, and how often sheets and checkpoints are written.
PLACES = ("model", "config", "pictures", "output", "sheet_every", "checkpoint_every")


#: A prompt that says something.
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Personalization(Training):
    """DreamBooth (arXiv 2208.12242) of a model. Defaults are those of diffusers' scripts (docs/personalize.md)."""

    model: PathOrId = Field(description="pipeline folder, .safetensors file, hub id or run folder")
    config: PathOrId | None = Field(default=None, description="for a single file: folder or hub id with configs")
    pictures: PathText = Field(description="folder with pictures of the subject")
    output: PathText = Field(description="folder for the results")
    prompt: Words = Field(description="what the pictures show, with a rare word for the subject")
    class_prompt: Words | None = Field(default=None, description="the prompt without the rare word")
    class_pictures: Steps = Field(default=200, description="pictures of the class that the model draws")
    prior_weight: Weight = Field(default=1.0, description="weight of the class in the loss")
    lora: Steps | None = Field(default=None, description="rank of the LoRA; null: all weights are trained")
    size: Size | None = Field(default=None, description="pixels; if not given, the model's native size")
    guidance_scale: Weight | None = Field(default=None, description="for pictures of the class and for sheets")
    seed: Seed = Field(default=1234, description="seed of the class pictures, the noise and the LoRA's first weights")
    batch_size: Annotated[Integer, Field(ge=1, le=1_000_000)] = Field(
        default=1, description="pictures of the subject in a step; equally many of the class are added"
    )
    learning_rate: Positive = Field(default=5e-6, description="learning rate of AdamW; for a LoRA 1e-4")
    warmup_steps: Annotated[Integer, Field(ge=0, le=1_000_000_000)] = Field(
        default=0, description="steps in which the learning rate rises from 0"
    )
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the average of the weights; null: no average"
    )
    caption_dropout: Fraction = Field(default=0.0, description="share of samples that see the empty prompt")
    sheet_every: Annotated[Integer, Field(ge=0)] = Field(default=200, description="steps between two sheets; 0: none")
    checkpoint_every: Steps = Field(default=200, description="steps between two checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _usual_pace(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        steps = 500 if values.get("lora") else 800 if values.get("class_prompt") else 400
        return {"steps": steps, "learning_rate": 1e-4 if values.get("lora") else 5e-6} | values

    @model_validator(mode="after")
    def _some_class(self) -> "Personalization":
        idle = [name for name in ("class_pictures", "prior_weight") if name in self.model_fields_set]
        if idle and self.class_prompt is None:
            raise ValueError(f"'{idle[0]}' has no meaning without a 'class_prompt': give one, or leave it out")
        if self.class_prompt == self.prompt:
            raise ValueError("'class_prompt' is the prompt itself: leave the rare word out of it")
        return self

    def settings(self, *without: str) -> dict[str, Any]:
        """Returns the keys that decide the result as plain JSON types, except those in `without`."""
        return super().settings(*PLACES, *without)

    @property
    def rows(self) -> int:
        """Inputs of the denoiser per sample: a picture of the subject, and with a class one of the class."""
        return 1 if self.class_prompt is None else 2

    @property
    def rank(self) -> int | None:
        """The rank of the LoRA that is trained; None: all weights are trained."""
        return self.lora


def personalization(**values: Any) -> Personalization:
    """Returns a checked `Personalization`; values that are None count as not given.

    Raises:
        UserError: a value does not fit (the first such value).
    """
    try:
        return Personalization.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise UserError(explain(error, Personalization)) from error
