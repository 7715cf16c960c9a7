"""The models of a pipeline as they are traced for programs other than torch: inputs, outputs, and their names."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunet.denoisers.freeze import freeze
from prunet.errors import UserError
from prunet.teacher.configs import read_object
from prunet.teacher.teacher import Teacher

#: Inputs that some U-Nets have after `sample`, `timestep` and `encoder_hidden_states`, in this order.
MORE_INPUTS = ("text_embeds", "time_ids", "timestep_cond")


class Part(NamedTuple):
    """A model of a pipeline: example inputs (two rows), the name and shape of each, and names of the outputs.

    A dimension of a shape is a number or, where it may be any, a name.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    inputs: dict[str, list[int | str]]
    outputs: list[str]
    config: dict[str, Any]


def parts(teacher: Teacher, vae: Any) -> Iterator[tuple[str, Part]]:
    """Yields denoiser, text encoders and the decoder of `vae` by the names of their folders."""
    yield "unet", _denoiser(teacher)
    for name in teacher.text_encoders:
        yield name, _text_encoder(teacher, name)
    channels = vae.config.latent_channels
    # Small latents, because only their number of channels matters, and tracing takes as long as drawing.
    example, shape = torch.zeros(2, channels, 4, 8), ["batch", channels, "height", "width"]
    yield "vae_decoder", Part(_Decoder(vae).eval(), (example,), {"latent_sample": shape}, ["sample"], dict(vae.config))


class _Denoiser(nn.Module):
    """A U-Net. `more`: the names of its inputs after the first three."""

    def __init__(self, unet: nn.Module, more: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.more = unet, more

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *more: Tensor,
    ) -> Tensor:
        named = dict(zip(self.more, more, strict=True))
        scale = named.pop("timestep_cond", None)
        how = {"timestep_cond": scale, "added_cond_kwargs": named or None, "return_dict": False}
        out: Tensor = self.unet(sample, timestep, encoder_hidden_states, **how)[0]
        return out


class _TextEncoder(nn.Module):
    """A text encoder. `hidden`: also returns the output of each layer; SDXL uses the second to last."""

    def __init__(self, encoder: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        first, second, *more = self.encoder(input_ids, output_hidden_states=self.hidden, return_dict=False)
        return (first, second, *more[0]) if self.hidden else (first, second)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.disable_slicing()  # it would trace the rows of the example one by one, and no other number of them
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        out: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return out


def _denoiser(teacher: Teacher) -> Part:
    config = teacher.unet_config
    side = teacher.architecture.side_step(config)
    # Sides that differ, and are not 1 at any level: a tracer takes equal sides, and those of 1, for fixed.
    example = teacher.architecture.example_inputs(config, 2, latent_size=(2 * side, 4 * side))
    context, more = example["encoder_hidden_states"], example | (example.get("added_cond_kwargs") or {})
    names = [name for name in MORE_INPUTS if name in more]
    inputs: dict[str, list[int | str]] = {
        "sample": ["batch", config["in_channels"], "height", "width"],
        "timestep": [1],
        "encoder_hidden_states": ["batch", "tokens", context.shape[-1]],
        **{name: ["batch", more[name].shape[1]] for name in names},
    }
    # Whole timesteps: openvino_genai refuses fractional ones.
    given = (example["sample"], torch.ones(1, dtype=torch.int64), context, *(more[name] for name in names))
    return Part(_Denoiser(teacher.unet, names).eval(), given, inputs, ["out_sample"], config)


def _text_encoder(teacher: Teacher, name: str) -> Part:
    encoder: Any = teacher.text_part(name)
    tokenizer: Any = teacher.text_part(name.replace("text_encoder", "tokenizer"))
    length, config, hidden = tokenizer.model_max_length, encoder.config, teacher.kind == "sdxl"
    outputs = ["text_embeds", "last_hidden_state"] if name.endswith("_2") else ["last_hidden_state", "pooler_output"]
    if hidden:
        outputs += [f"hidden_states.{i}" for i in range(config.num_hidden_layers + 1)]
    example = (torch.zeros(2, length, dtype=torch.int64),)
    model = _TextEncoder(encoder, hidden).eval()
    return Part(model, example, {"input_ids": ["batch", length]}, outputs, config.to_dict())


def open_decoder(folder: Path | str, teacher: Teacher) -> Any:
    """Opens a small decoder for a teacher's latents: a folder with diffusers' `AutoencoderTiny`, such as TAESD.

    Raises:
        UserError: the folder has no such model, or the model is for other latents.
    """
    from diffusers import AutoencoderTiny

    config = read_object(Path(folder) / "config.json", f"{folder} is not a decoder")
    if config.get("_class_name") != AutoencoderTiny.__name__:
        raise UserError(f"{folder}: a {config.get('_class_name')}: give an AutoencoderTiny")
    try:
        vae = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # any kind of error, since diffusers does not check the values
        raise UserError(f"{folder}: diffusers cannot open this AutoencoderTiny ({error}): fetch or copy it") from error
    theirs = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    ours = teacher.part_config("vae").get("latent_channels", 4), teacher.vae_scale
    if theirs != ours:
        shown = ("{} channels of 1/{} of the side".format(*pair) for pair in (theirs, ours))
        raise UserError(f"{folder}: for latents of {next(shown)}, those of {teacher.source} have {next(shown)}")
    return freeze(vae)
