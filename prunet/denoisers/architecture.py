"""What all denoisers have in common: the interface behind which each diffusers class keeps what is peculiar to it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from prunet.console import quiet_libraries
from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.condition import Condition
from prunet.denoisers.diagram import Diagram
from prunet.denoisers.form import Form
from prunet.denoisers.pairs import Level, Pair
from prunet.denoisers.patterns import removed_parts
from prunet.denoisers.taps import tap
from prunet.errors import UserError

#: A denoiser: a stock diffusers model with its config and its way to be saved.
Net: TypeAlias = ModelMixin
Config = Mapping[str, Any]


class Architecture(ABC):
    """One diffusers class of denoisers. Works on configs and holds no weights."""

    class_name: str  # diffusers' name of the class
    part: str  # the name of the denoiser's folder in a pipeline: `unet` or `transformer`
    levels: tuple[Level, ...]
    last_layer: str  # the module that gives the output
    parts_help: str  # what a plan may name, for messages
    only_form: bool = False  # whether prunet plans and builds its students, but cannot train or draw with it yet
    adapters: AdapterForms  # how its adapters are made

    @property
    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Classes of the repeated blocks: what FSDP gathers together."""

    @abstractmethod
    def make(self, config: Config) -> Net:
        """A model of `config` with random weights."""

    @abstractmethod
    def parts(self, config: Config) -> list[str]:
        """The names of the modules that a plan may remove."""

    @abstractmethod
    def outline(self, config: Config) -> str:
        """Where its parts are, for a pattern that matches none of them."""

    @abstractmethod
    def form(self, config: Config, removed: Mapping[str, str]) -> Form:
        """The stock denoiser that is left without the parts `removed`, each with the pattern that named it.

        Raises:
            UserError: diffusers has no form for it.
        """

    @abstractmethod
    def pairs(self, teacher: Config, form: Form, level: Level) -> tuple[Pair, ...]:
        """The modules that distillation compares at `level`, one of `levels`.

        Raises:
            UserError: the outputs of a pair have different shapes.
        """

    @abstractmethod
    def loads_in(self, config: Config) -> dict[str, str]:
        """Program -> "yes", or "no: " and why a student of `config` does not load there."""

    @abstractmethod
    def works_with(self, teacher: Config, form: Form) -> dict[str, str]:
        """Addition to the teacher (a ControlNet, say) -> "yes", or "no: " and why it does not fit the student."""

    @abstractmethod
    def diagram(self, config: Config, gone: Iterable[str]) -> Diagram:
        """The denoiser as terminal and page show it, without the parts `gone`."""

    @abstractmethod
    def native_latent_size(self, config: Config) -> tuple[int, int]:
        """(height, width) of the latents that the model was made for."""

    @abstractmethod
    def side_step(self, config: Config) -> int:
        """The number of which each side of the latents must be a multiple."""

    @abstractmethod
    def example_inputs(
        self,
        config: Config,
        batch_size: int = 1,
        *,
        latent_size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of the model's `forward`: zeros (or meta tensors) of the right shapes."""

    @abstractmethod
    def call(self, net: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, C, h, w) of `net`, which may be wrapped, for `noisy` latents (B, C, h, w) at `timestep`
        (B,), as the noise scheduler counts it.
        """

    def fast_attention(self, nets: Iterable[Net], device: torch.device, *, half: bool) -> AbstractContextManager[None]:
        """A faster attention of `nets` on `device` while it lasts, where prunet has one."""
        return nullcontext()

    # -- what follows from the above

    def random_inputs(self, config: Config) -> dict[str, Any]:
        """An example call on the CPU with the smallest latents that fit: always the same random numbers for zeros."""
        side = self.side_step(config)
        inputs = self.example_inputs(config, latent_size=(side, side))
        generator = torch.Generator().manual_seed(0)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = torch.randn(value.shape, generator=generator)
        return inputs

    def skeleton(self, config: Config) -> Any:
        """The model of `config` on the meta device: names and shapes without storage. Shared: do not change it.

        Raises:
            UserError: diffusers cannot make it.
        """
        try:
            return _skeleton(self, config_text(config))
        except Exception as error:  # of any kind: diffusers takes the values as they are
            raise UserError(f"diffusers cannot make a {self.class_name} of this config: {error}") from error

    def empty(self, config: Config) -> Net:
        """A model to be filled by assignment: its parameters are on the meta device; what no state dict holds, such as
        tables of positions, is real, since nothing would fill it.

        Raises:
            UserError: diffusers cannot make it.
        """
        self.skeleton(config)
        with init_empty_weights(include_buffers=False):
            return self.make(config).eval()

    @quiet_libraries()
    def load(self, folder: Path) -> Net:
        """The model of a stock folder, in fp32."""
        cls = getattr(diffusers, self.class_name)
        net: Net = cls.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
        return net

    def module_names(self, config: Config) -> list[str]:
        """All modules of the model of `config`, by their dotted names."""
        return [name for name, _ in self.skeleton(config).named_modules() if name]

    def removed_parts(self, config: Config, patterns: Iterable[str]) -> dict[str, str]:
        """Part -> the pattern that removes it.

        Raises:
            UserError: a pattern matches nothing, or what cannot be removed.
        """
        parts = self.parts(config)
        return removed_parts(
            patterns, self.module_names(config), parts, outline=self.outline(config), parts_help=self.parts_help
        )

    @torch.no_grad()
    def call_skeleton(self, config: Config, latent_size: tuple[int, int] | None = None) -> None:
        """One call on the meta device, for what watches it; the only place where a config can turn out not to work.

        Raises:
            UserError: the denoiser of this config cannot be called.
        """
        net = self.skeleton(config)
        try:
            net(**self.example_inputs(config, latent_size=latent_size, device="meta"))
        except Exception as error:  # of any kind: diffusers takes the values as they are
            why = str(error) or type(error).__name__
            raise UserError(f"The {self.class_name} of this config cannot be called: {why}") from error

    def output_shapes(self, config: Config, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Module -> shape of its output without the batch, of one call at the native size."""
        return dict(_output_shapes(self, config_text(config), tuple(names)))


def config_of(net: Net) -> dict[str, Any]:
    """The config of a model, which may be compiled, with the name of its class."""
    bare = getattr(net, "_orig_mod", net)
    # FSDP gives a model a class of its own, made of diffusers'.
    stock = next(cls for cls in type(bare).__mro__ if cls.__module__.startswith("diffusers."))
    return {**bare.config, "_class_name": stock.__name__}


def config_text(config: Config) -> str:
    """A config as a key for a cache."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


@lru_cache(maxsize=64)
def _output_shapes(architecture: Architecture, text: str, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    config = json.loads(text)
    net = architecture.skeleton(config)
    with tap([net.get_submodule(name) for name in names]) as features:
        architecture.call_skeleton(config)
        return {name: tuple(feature.shape[1:]) for name, feature in zip(names, features.take(), strict=True)}


@lru_cache(maxsize=32)
def _skeleton(architecture: Architecture, text: str) -> Any:
    with torch.device("meta"):
        return architecture.make(json.loads(text)).eval().requires_grad_(False)


def check_shapes(architecture: Architecture, teacher: Config, student: Config, pairs: Sequence[Pair]) -> None:
    """Compares what the modules of each pair give, on the meta device, so that nothing fails at step 1.

    Raises:
        UserError: the outputs of a pair have different shapes.
    """
    ours = architecture.output_shapes(student, [pair.student for pair in pairs])
    theirs = architecture.output_shapes(teacher, [pair.teacher for pair in pairs])
    for pair in pairs:
        if ours[pair.student] != theirs[pair.teacher]:
            raise UserError(
                f"{pair.student} of the student gives {ours[pair.student]} and {pair.teacher} of the teacher "
                f"{theirs[pair.teacher]}: they cannot be compared; choose another level of losses"
            )
