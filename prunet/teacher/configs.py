"""Checks of a pipeline's configs, because the libraries use the values of a user's JSON unchecked.

Type and size are checked for the fields that prunet reads itself, and for those that decide how much is built (layers,
widths, timesteps). All other fields are left to diffusers; building the model on the meta device tries them (`skeleton`
in `prunet.denoisers.unet2d.form`), or making the scheduler.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunet.disk.reading import check_permission, parse_json
from prunet.errors import UserError
from prunet.recipe.recipe import explain

#: A number of channels, tokens or pixels.
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
#: A number of consecutive layers, or the size of a kernel.
Few = Annotated[int, Field(strict=True, ge=1, le=100)]
#: Transformer blocks of a level of the U-Net; 0 if it has none.
Depth = Annotated[int, Field(strict=True, ge=0, le=100)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Some = Field(min_length=1, max_length=10)
Depths = Annotated[list[Depth | Annotated[list[Depth], Some]], Some]
Truth = Annotated[bool, Field(strict=True)]
#: Limit for transformer blocks, or layers, on one side of a U-Net; SDXL would have 60 if all its layers were deepest.
DEEPEST = 300
#: Limit for the numbers in a transformer's config: widths, tokens, positions.
LARGEST = 100_000


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class _Index(_Fields):
    name: str = Field(alias="_class_name")
    requires_safety_checker: Truth | None = None
    force_zeros_for_empty_prompt: Truth | None = None

    @model_validator(mode="after")
    def _parts(self) -> "_Index":
        for part, value in (self.model_extra or {}).items():
            is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(v, str | None) for v in value)
            # The name becomes that of a folder beside the file, so it must not lead elsewhere.
            if isinstance(value, list) and not (is_pair and re.fullmatch(r"\w+", part)):
                raise ValueError(
                    f"{part!r}: {value}: a part has a name of letters, digits and _, a library and a class"
                )
        return self


class _UNet(_Fields):
    name: str = Field(default="UNet2DConditionModel", alias="_class_name")
    sample_size: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: Annotated[list[Count], Some]
    down_block_types: Annotated[list[Literal["DownBlock2D", "CrossAttnDownBlock2D"]], Some]
    up_block_types: Annotated[list[Literal["UpBlock2D", "CrossAttnUpBlock2D"]], Some]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = None
    layers_per_block: Few | Annotated[list[Few], Some]
    transformer_layers_per_block: Depth | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    cross_attention_dim: Count | Annotated[list[Count], Some]
    attention_head_dim: Count | Annotated[list[Count], Some] = 8
    num_attention_heads: Count | Annotated[list[Count], Some] | None = None
    norm_num_groups: Count | None = 32
    time_embedding_dim: Count | None = None
    time_cond_proj_dim: Literal[256] | None = None
    act_fn: str = "silu"
    class_embed_type: str | None = None
    encoder_hid_dim_type: str | None = None
    resnet_time_scale_shift: str = "default"
    time_embedding_type: str = "positional"
    addition_embed_type: str | None = None
    addition_time_embed_dim: Count | None = None
    projection_class_embeddings_input_dim: Count | None = None
    num_class_embeds: Count | None = None
    encoder_hid_dim: Count | None = None
    conv_in_kernel: Few = 3
    conv_out_kernel: Few = 3
    dual_cross_attention: Literal[False] | None = None
    only_cross_attention: Truth | Annotated[list[Truth], Some] | None = None
    use_linear_projection: Truth | None = None
    upcast_attention: Truth | None = None
    center_input_sample: Truth | None = None
    flip_sin_to_cos: Truth | None = None

    @model_validator(mode="after")
    def _whole(self) -> "_UNet":
        if self.out_channels != self.in_channels:
            raise ValueError(f"out_channels {self.out_channels} must equal in_channels {self.in_channels}")
        blocks = [self.transformer_layers_per_block, self.reverse_transformer_layers_per_block or 1]
        deepest = len(self.down_block_types) * _largest(self.layers_per_block) * _largest(blocks)
        if deepest > DEEPEST:
            raise ValueError(
                f"layers_per_block and transformer_layers_per_block make {deepest:,} transformer blocks on one side, "
                f"more than {DEEPEST}"
            )
        return self


class _Transformer(_Fields):
    """A transformer of any class; its `Architecture` checks the number of blocks."""

    name: str = Field(alias="_class_name")
    sample_size: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> "_Transformer":
        for field, value in (self.model_extra or {}).items():
            numbers = list(_numbers(value))
            if len(numbers) > DEEPEST or not all(0 <= number <= LARGEST for number in numbers):
                raise ValueError(f"{field}: not a number from 0 to {LARGEST:,}, or at most {DEEPEST} of them")
        return self


class _Vae(_Fields):
    sample_size: Count | None = None
    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 4
    block_out_channels: Annotated[list[Count], Some]
    down_block_types: Annotated[list[str], Some] = ["DownEncoderBlock2D"]
    up_block_types: Annotated[list[str], Some] = ["UpDecoderBlock2D"]
    layers_per_block: Few = 1
    norm_num_groups: Count = 32
    scaling_factor: Annotated[Real, Field(gt=0)] = 0.18215
    force_upcast: Truth | None = None


class _TextEncoder(_Fields):
    vocab_size: Count = 49408
    max_position_embeddings: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 77
    hidden_size: Count = 512
    intermediate_size: Count = 2048
    projection_dim: Count | None = None
    num_hidden_layers: Few = 12
    num_attention_heads: Count = 8


class _Scheduler(_Fields):
    name: str = Field(default="DDPMScheduler", alias="_class_name")
    num_train_timesteps: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1000
    beta_start: Annotated[Real, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[Real, Field(gt=0, lt=1)] = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[list[Real], Field(max_length=100_000)] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0
    rescale_betas_zero_snr: Truth | None = None


_CONFIGS: dict[str, type[_Fields]] = {
    "model_index": _Index,
    "unet": _UNet,
    "transformer": _Transformer,
    "vae": _Vae,
    "text_encoder": _TextEncoder,
    "text_encoder_2": _TextEncoder,
    "scheduler": _Scheduler,
}


def check_config(part: str, config: Mapping[str, Any], path: Path) -> None:
    """Refuses a config with a field of the wrong type, or of a size that no such part has.

    `part`: its name in the pipeline, or `model_index`. `path`: the file, for the message.

    Raises:
        UserError: a field is wrong; the message names the file and the field.
    """
    try:
        _CONFIGS[part].model_validate(config)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}: fetch or copy it again, or correct that field") from error


def read_object(path: Path, message: str, fix: str = "fetch or copy it again") -> dict[str, Any]:
    """Reads a JSON object; `message` begins the text of errors, and `fix` ends it.

    Raises:
        UserError: the file is missing, not JSON, or not an object.
    """
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{message}: no file {path}: {fix}")
    check_permission(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{message}: {path} is not readable JSON ({error}): {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{message}: {path} is not a JSON object: {fix}")
    return value


def check_condition(unet: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuses text encoders with embeddings of another width than the U-Net takes; `source` begins the message.

    Raises:
        UserError: the widths differ; the message names both.
    """
    takes = unet["cross_attention_dim"]
    for width in takes if isinstance(takes, list) else [takes]:
        given = sum(config.get("hidden_size", 512) for config in encoders)
        if width != given:
            raise UserError(
                f"{source}: its U-Net takes text embeddings of width {width}, but its text encoders give {given}: copy "
                "both from one pipeline"
            )


def _largest(depths: Any) -> int:
    return max(map(_largest, depths)) if isinstance(depths, list) else depths


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
