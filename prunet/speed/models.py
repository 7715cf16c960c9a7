"""Models for timing: one interface for stock pipelines of torch and folders for other runtimes."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from prunet.denoisers.architecture import config_of
from prunet.errors import UserError
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import load_plan
from prunet.recipe.values import Drawing
from prunet.sampling.draw import Model, open_any
from prunet.sampling.made_for import drawing_of
from prunet.sampling.runtime_folder import Part, RuntimeFolder
from prunet.speed.clock import Call, denoiser_call, random_inputs, weights_mb
from prunet.speed.sd_cpp import CppFile, CppModel
from prunet.student.student import inherit
from prunet.teacher.runtimes import runtime_of
from prunet.teacher.space import check_size
from prunet.teacher.teacher import Teacher
from prunet.words import config_for, names_of

PROMPT = "a photograph of an astronaut riding a horse"


class TorchModel:
    """A stock pipeline, on its device and in its precision.

    `mode`: how its denoiser runs without a compiler; `config`: config of the denoiser; `scale`: pixels per latent along
    one side; `precision`: that of weights and computation; `weights_mb`: weights of all parts (MiB).
    """

    runtime, mode = "torch", "eager"

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.device, self.scale = pipe, pipe.device, pipe.vae_scale_factor
        self.config: Mapping[str, Any] = config_of(pipe.unet)
        self.precision = str(pipe.unet.dtype).removeprefix("torch.")
        self.weights_mb = sum(weights_mb(part) for part in pipe.components.values() if isinstance(part, nn.Module))

    def calls(self, batch: int, rows: int, latent_size: tuple[int, int]) -> dict[str, Call]:
        """Returns the calls for a batch of pictures, on random inputs: `text`, the denoiser (named `mode`) and `vae`.

        `text` includes tokenizing; the denoiser gets `rows` latents for each picture.
        """
        pipe, device = self.pipe, self.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, pipe.vae.config.latent_channels, *latent_size)
        latents = torch.randn(shape, generator=generator, device=device, dtype=pipe.vae.dtype)
        text = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": rows > 1}
        return {
            "text": partial(pipe.encode_prompt, [PROMPT] * batch, **text),
            self.mode: denoiser_call(pipe.unet, rows * batch, latent_size=latent_size, device=device),
            "vae": partial(pipe.vae.decode, latents),
        }


class RuntimeModel:
    """A folder for another runtime on the CPU, with as many threads as torch has; it has the fields of `TorchModel`."""

    def __init__(self, folder: RuntimeFolder, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self.runtime = self.mode = folder.form
        self.device, self.scale, self.config = torch.device("cpu"), folder.vae_scale, folder.unet_config
        self.precision, self.weights_mb = folder.precision_of(dtype), folder.facts["bytes"] / 2**20

    @cached_property
    def _parts(self) -> dict[str, Part]:
        return self._folder.open_parts(self._dtype)

    def calls(self, batch: int, rows: int, latent_size: tuple[int, int]) -> dict[str, Call]:
        """Returns the same calls; `text` does not include tokenizing."""
        texts = [part for name, part in self._parts.items() if name.startswith("text_encoder")]
        ids = {"input_ids": np.zeros((rows * batch, self._folder.tokens), np.int64)}
        given = random_inputs(self.config, rows * batch, latent_size=latent_size)
        given |= given.pop("added_cond_kwargs", {})
        arrays = {name: value.numpy() for name, value in given.items()}
        arrays["timestep"] = arrays["timestep"][:1].astype(np.int64)
        return {
            "text": lambda: [part(ids) for part in texts],
            self.mode: partial(self._parts["unet"], arrays),
            "vae": partial(self._parts["vae_decoder"], {"latent_sample": arrays["sample"][:batch]}),
        }


TimedModel: TypeAlias = TorchModel | RuntimeModel | CppModel


def open_models(
    models: Sequence[str],
    plans: Sequence[str] = (),
    *,
    size: int | None = None,
    config: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sd_cpp: str | None = None,
) -> dict[str, TimedModel]:
    """Opens the models (see `open_any`), and the first one reduced by each of `plans`, by name.

    `sd_cpp`: stable-diffusion.cpp, which draws with all models that are files.

    Raises:
        UserError: a model cannot be opened, is given twice, or cannot draw pictures of `size` pixels on `device`; or a
            plan does not fit the first model. All of this is checked before weights are loaded.
    """
    names = names_of(models)
    opened = [_open(Model(model, config_for(model, config, models), device, dtype), sd_cpp) for model in models]
    first = opened[0]
    if isinstance(first, CppFile):
        raise UserError(f"{models[0]}: stable-diffusion.cpp cannot be the baseline: give another model first")
    if sd_cpp and not any(isinstance(one, CppFile) for one in opened):
        raise UserError("--sd-cpp: no model is a file: give NAME.gguf or NAME.safetensors that prunet exported for it")
    for model, one in zip(models, opened, strict=True):
        if isinstance(one, RuntimeFolder | CppFile) and torch.device(device).type != "cpu":
            raise UserError(f"--device {device}: {model} is drawn with on the CPU: give cpu, or leave it out")
        check_size(one, size or first.native_size, "size")
        one.check_weights()
    students = {}
    if plans:
        if isinstance(first, RuntimeFolder):
            raise UserError(
                f"--plan: needs a model of torch first, and {models[0]} is for {first.runtime}: give it second"
            )
        students = {f"plan {p}": partial(_reduced, first, derive(first.unet_config, load_plan(p))) for p in plans}
    timed = {name: _timed(one, dtype) for name, one in zip(names, opened, strict=True)}
    return timed | {name: make() for name, make in students.items()}


def _open(model: Model, sd_cpp: str | None) -> Teacher | RuntimeFolder:
    return CppFile(model.source, sd_cpp) if sd_cpp and Path(model.source).is_file() else open_any(model)


def _timed(one: Teacher | RuntimeFolder, dtype: torch.dtype) -> TimedModel:
    if isinstance(one, RuntimeFolder):
        return RuntimeModel(one, dtype)
    return CppModel(one) if isinstance(one, CppFile) else TorchModel(one.pipeline())


def _reduced(teacher: Teacher, derived: Derived) -> TorchModel:
    return TorchModel(
        teacher.pipeline(unet=nn.Module.to(inherit(teacher.unet, derived), teacher.device, teacher.dtype))
    )


def sources_of(
    models: Sequence[str],
    *,
    config: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    sd_cpp: str | None = None,
) -> dict[str, Model] | None:
    """Returns the models to open once more, each in a process whose memory is measured, by name.

    None if all are of torch, whose memory is known without that. Stable-diffusion.cpp is a process of its own.
    """
    if not sd_cpp and not any(map(runtime_of, models)):
        return None
    named = zip(names_of(models), models, strict=True)
    return {
        name: Model(model, config_for(model, config, models), device, dtype)
        for name, model in named
        if not (sd_cpp and Path(model).is_file())
    }


def drawings(
    models: Sequence[str], *, config: str | None = None, steps: int | None = None, sd_cpp: str | None = None
) -> dict[str, Drawing]:
    """Returns how to draw with each model, by name: as it was made for, else in 25 guided steps; `steps` if given."""
    asked = Drawing.given(steps=steps)
    opened = (_open(Model(model, config_for(model, config, models)), sd_cpp) for model in models)
    ways = (
        one.drawing_of(asked) if isinstance(one, RuntimeFolder) else drawing_of(one, Drawing(), asked) for one in opened
    )
    return dict(zip(names_of(models), ways, strict=True))
