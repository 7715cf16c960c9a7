"""Types of values in a recipe: numbers within bounds, and parts that refuse unknown keys."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # Python would accept it as 1 or 0
        raise ValueError(f"give a number, not {str(value).lower()}")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]
Steps = Annotated[Integer, Field(ge=1, le=1_000_000_000)]
#: Steps of a sampler; Stable Diffusion's noise schedules have no more.
DrawingSteps = Annotated[Integer, Field(ge=1, le=1000)]
#: Number of samples from each picture or prompt.
Copies = Annotated[Integer, Field(ge=1, le=1000)]
Size = Annotated[Integer, Field(ge=8, le=4096)]
Seed = Annotated[Integer, Field(ge=0, le=2**62)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


def _rising(scales: tuple[float, float]) -> tuple[float, float]:
    if not 1 <= scales[0] < scales[1]:
        raise ValueError("a range is two rising numbers from 1 on, such as [1, 8]")
    return scales


#: The smallest and the largest of a range of guidance scales; 1 is no guidance.
GuidanceRange = Annotated[tuple[Weight, Weight], AfterValidator(_rising)]
#: One guidance scale or a range; errors are those of the type that was given.
GuidanceScales = Annotated[
    Annotated[Weight, Tag("one-scale")] | Annotated[GuidanceRange, Tag("a-range")],
    Discriminator(lambda value: "a-range" if isinstance(value, list | tuple) else "one-scale"),
]
Fraction = Annotated[Number, Field(ge=0, lt=1, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a recipe; it refuses unknown keys and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Drawing(Part):
    """How pictures are drawn."""

    steps: DrawingSteps = Field(default=25, description="steps of the sampler")
    guidance_scale: Weight = Field(default=7.5, description="up to 1: no guidance, half of the calls")
    sampler: str = Field(
        default="dpmsolver++", description="dpmsolver++, ddim, ddim-trailing, pndm, euler, euler-a, lcm or unipc"
    )

    @classmethod
    def given(cls, **values: Any) -> Self:
        """Returns a drawing that sets only the values that are not None."""
        return cls.model_validate({name: value for name, value in values.items() if value is not None})

    @property
    def rows(self) -> int:
        """Inputs of the denoiser per step and picture: 1, or 2 with guidance, which also needs the empty prompt."""
        return 2 if self.guidance_scale > 1 else 1

    def __str__(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else "no guidance"
        return f"{self.sampler}, {self.steps} step{'s' if self.steps > 1 else ''}, {guidance}"


class EmbeddedGuidance(Drawing):
    """How pictures are drawn by a denoiser that takes the guidance scale as an input: one call a step at any scale."""

    guidance_range: GuidanceRange = Field(description="the scales that it learned")

    @property
    def rows(self) -> int:
        """Inputs of the denoiser per step and picture."""
        return 1

    def __str__(self) -> str:
        return "{} of {:g} to {:g}, in one call".format(super().__str__(), *self.guidance_range)

    def nearest(self, scale: float) -> Self:
        """Returns the drawing at the learned scale that is nearest to `scale`."""
        low, high = self.guidance_range
        return self.model_copy(update={"guidance_scale": min(max(scale, low), high)})

    @model_validator(mode="after")
    def _is_learned(self) -> Self:
        low, high = self.guidance_range
        if not low <= self.guidance_scale <= high:
            raise ValueError(f"guidance_scale {self.guidance_scale:g}: the model learned {low:g} to {high:g}")
        return self
