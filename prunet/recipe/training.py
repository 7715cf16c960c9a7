"""The settings of every training, for any objective: steps, batches, optimizer, average."""

from typing import Annotated, Any, Literal

from pydantic import Field

from prunet.recipe.values import Fraction, Integer, Number, Part, Positive, Steps, Weight


class Training(Part):
    """How the loop trains a denoiser: steps, batches, optimizer, average."""

    steps: Steps = Field(description="updates of the weights")
    batch_size: Annotated[Integer, Field(ge=1, le=1_000_000)] = Field(
        default=256, description="samples in a step, over all processes and micro-batches"
    )
    learning_rate: Positive = Field(default=5e-5, description="learning rate of AdamW after the warm-up")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="schedule of the learning rate")
    warmup_steps: Annotated[Integer, Field(ge=0, le=1_000_000_000)] = Field(
        default=500, description="steps in which the learning rate rises from 0"
    )
    weight_decay: Weight = Field(default=1e-2, description="weight decay of AdamW")
    max_grad_norm: Positive = Field(default=1.0, description="norm to which gradients are clipped")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=0.9999, description="decay of the average of the weights, which is exported; null: no average"
    )
    caption_dropout: Fraction = Field(default=0.1, description="share of samples that see the empty prompt")

    def settings(self, *without: str) -> dict[str, Any]:
        """Returns the keys that decide the result as plain JSON types, except those in `without`."""
        return self.model_dump(mode="json", exclude=set(without))

    @property
    def teacher_calls(self) -> int:
        """Calls of the teacher per sample."""
        return 0

    @property
    def rows(self) -> int:
        """Inputs of the denoiser per sample."""
        return 1

    @property
    def rank(self) -> int | None:
        """The rank of the LoRA that is trained; None: all weights are trained."""
        return None
