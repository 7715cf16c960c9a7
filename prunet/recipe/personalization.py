"""What decides a personalised model: the model, a few pictures of a subject, and how it is trained on them."""

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from prunet.errors import UserError
from prunet.recipe.paths import PathOrId, PathText
from prunet.recipe.recipe import explain
from prunet.recipe.training import Training
from prunet.recipe.values import Fraction, Integer, Number, Positive, Seed, Size, Steps, Weight

#: Fields that decide where a personalisation lies and what is shown of it, not what is learned.
PLACES = ("model", "config", "pictures", "output", "sheet_every", "checkpoint_every")


class Personalization(Training):
    """DreamBooth (arXiv 2208.12242) of a model. Defaults are those of diffusers' scripts (docs/personalize.md)."""

    model: PathOrId = Field(description="pipeline folder, .safetensors file, hub id or run folder")
    config: PathOrId | None = Field(default=None, description="for a single file: folder or hub id with configs")
    pictures: PathText = Field(description="folder with pictures of the subject")
    output: PathText = Field(description="folder for all that is made")
    prompt: Annotated[str, Field(min_length=1)] = Field(description="what the pictures show, with a rare word for it")
    class_prompt: Annotated[str, Field(min_length=1)] | None = Field(default=None, description="without the word")
    class_pictures: Steps = Field(default=200, description="pictures of the class that the model draws")
    prior_weight: Weight = Field(default=1.0, description="of the class in the loss")
    lora: Steps | None = Field(default=None, description="rank; null: all weights of the denoiser are trained")
    size: Size | None = Field(default=None, description="pixels; the model's own if not given")
    guidance_scale: Weight | None = Field(default=None, description="for pictures of the class, and sheets")
    seed: Seed = Field(default=1234, description="of the class, the noise and the LoRA's first weights")
    batch_size: Annotated[Integer, Field(ge=1, le=1_000_000)] = Field(
        default=1, description="pictures of the subject a step; as many of the class come to them"
    )
    learning_rate: Positive = Field(default=5e-6, description="AdamW's; of a LoRA 1e-4")
    warmup_steps: Annotated[Integer, Field(ge=0, le=1_000_000_000)] = Field(default=0, description="none by default")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(default=None, description="null: no average")
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
        return self

    def settings(self, *without: str) -> dict[str, Any]:
        """The keys that decide the result, `without` some, as plain JSON types."""
        return super().settings(*PLACES, *without)

    @property
    def rows(self) -> int:
        """Inputs of the denoiser per sample: a picture of the class beside each of the subject."""
        return 1 if self.class_prompt is None else 2

    @property
    def rank(self) -> int | None:
        """The rank of the LoRA that is trained; None: all weights are trained."""
        return self.lora


def personalization(**values: Any) -> Personalization:
    """A checked `Personalization`; values that are None count as not given.

    Raises:
        UserError: the first value that does not fit.
    """
    try:
        return Personalization.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise UserError(explain(error, Personalization)) from error
