"""The interface of all denoisers; each diffusers class of denoisers implements it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prunet.console import quiet_libraries
from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.condition import Condition
from prunet.denoisers.form import Form
from prunet.denoisers.pairs import Level, Pair
from prunet.denoisers.patterns import removed_parts
from prunet.diagram import Diagram
from prunet.errors import UserError

#: A denoiser: a stock diffusers model, which has a config and can be saved.
Net: TypeAlias = ModelMixin
Config = Mapping[str, Any]
#: Ends of the names of an attention's layers: those that LoRAs change.
ATTENTION_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclass
class Trace:
    """One call of a denoiser, on the meta device.

    `shapes` maps each module to the shape of its output (of the first one, if it has several), without the batch.
    `flops` maps each operation to its floating-point operations. `leaf_elements` counts the elements of the outputs of
    all modules without children.
    """

    shapes: dict[str, tuple[int, ...]]
    flops: dict[str, int]
    leaf_elements: int


class Architecture(ABC):
    """One diffusers class of denoisers. Works on configs and holds no weights."""

    class_name: str  # the name of the class in diffusers
    part: str  # the name of the denoiser's folder in a pipeline: `unet` or `transformer`
    levels: tuple[Level, ...]  # for the feature losses
    last_layer: str  # the module that computes the output
    ends: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # maps classes of layers to the linear maps whose sum ends them
    parts_help: str  # the parts that a plan may name, for messages
    only_form: bool = False  # True: prunet plans and builds its students, but cannot train or draw with them yet
    adapters: AdapterForms

    @property
    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Classes of the repeated blocks; FSDP gathers the weights of a block together."""

    @abstractmethod
    def make(self, config: Config) -> Net:
        """Makes a model of `config` with random weights."""

    @abstractmethod
    def parts(self, config: Config) -> list[str]:
        """Lists the names of the modules that a plan may remove."""

    @abstractmethod
    def outline(self, config: Config) -> str:
        """Describes where its parts are, for the message about a pattern that matches no part."""

    @abstractmethod
    def form(self, config: Config, removed: Mapping[str, str]) -> Form:
        """Returns the stock denoiser without the parts `removed`; each part is mapped to its pattern.

        Raises:
            UserError: diffusers has no form for it.
        """

    @abstractmethod
    def pairs(self, teacher: Config, form: Form, level: Level) -> tuple[Pair, ...]:
        """Returns the modules that distillation compares at `level`, one of `levels`.

        Raises:
            UserError: the outputs of a pair have different shapes.
        """

    @abstractmethod
    def loads_in(self, config: Config) -> dict[str, str]:
        """Maps each program to "yes", or to "no: " and the reason why a student of `config` does not load there."""

    @abstractmethod
    def works_with(self, teacher: Config, form: Form) -> dict[str, str]:
        """Maps each addition to the teacher (such as a ControlNet) to "yes", or to "no: " and why it does not fit."""

    @abstractmethod
    def diagram(self, config: Config, gone: Iterable[str]) -> Diagram:
        """Returns the diagram of the denoiser for terminal and page, with the parts `gone` marked as removed."""

    @abstractmethod
    def native_latent_size(self, config: Config) -> tuple[int, int]:
        """Returns (height, width) of the latents that the model was made for."""

    @abstractmethod
    def side_step(self, config: Config) -> int:
        """Returns the number that both sides of the latents must be multiples of."""

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
        """Returns keyword arguments for the model's `forward`: zeros (or meta tensors) of the right shapes."""

    @abstractmethod
    def call(self, net: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the prediction (B, C, h, w) of `net` for `noisy` latents (B, C, h, w) at `timestep` (B,).

        `net` may be wrapped. Timesteps are those of the noise scheduler.
        """

    def takes_guidance(self, config: Config) -> bool:
        """Returns whether the denoiser takes the guidance scale as an input (`guidance_scale` in its condition)."""
        return False

    def with_guidance(self, form: Form) -> Form:
        """Returns the form of the same student that takes the guidance scale as an input.

        Raises:
            UserError: diffusers has no form for it.
        """
        raise UserError(f"diffusers has no {self.class_name} that learns the guidance scale: give one guidance_scale")

    def fast_attention(self, nets: Iterable[Net], device: torch.device, *, half: bool) -> AbstractContextManager[None]:
        """Gives `nets` a faster attention on `device` inside the `with` block, if prunet has one."""
        return nullcontext()

    # -- derived from the above

    def random_inputs(self, config: Config) -> dict[str, Any]:
        """Returns an example call on the CPU with the smallest latents that fit; its random numbers are fixed."""
        side = self.side_step(config)
        inputs = self.example_inputs(config, latent_size=(side, side))
        generator = torch.Generator().manual_seed(0)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = torch.randn(value.shape, generator=generator)
        return inputs

    def skeleton(self, config: Config) -> Any:
        """Returns the model of `config` on the meta device: names and shapes without storage. Do not change it.

        Raises:
            UserError: diffusers cannot make it.
        """
        try:
            return _skeleton(self, config_text(config))
        except Exception as error:  # any kind of error, since diffusers does not check the values
            raise UserError(
                f"diffusers cannot make a {self.class_name} of this config: {error}: fetch or copy it again"
            ) from error

    def empty(self, config: Config) -> Net:
        """Makes a model on the meta device, to be filled by assignment.

        Tensors that a state dict does not contain, such as tables of positions, are real.

        Raises:
            UserError: diffusers cannot make it.
        """
        self.skeleton(config)
        with init_empty_weights(include_buffers=False):
            return self.make(config).eval()

    @quiet_libraries()
    def load(self, folder: Path) -> Net:
        """Loads the model of a stock folder, in fp32."""
        cls = getattr(diffusers, self.class_name)
        net: Net = cls.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
        return net

    def module_names(self, config: Config) -> list[str]:
        """Lists the dotted names of all modules of the model of `config`."""
        return [name for name, _ in self.skeleton(config).named_modules() if name]

    def removed_parts(self, config: Config, patterns: Iterable[str]) -> dict[str, str]:
        """Maps each part that `patterns` remove to its pattern.

        Raises:
            UserError: a pattern matches nothing, or a module that cannot be removed.
        """
        parts = self.parts(config)
        return removed_parts(
            patterns, self.module_names(config), parts, outline=self.outline(config), parts_help=self.parts_help
        )

    def trace(self, config: Config, latent_size: tuple[int, int] | None = None) -> Trace:
        """Returns what a call of the denoiser with batch 1 does; by default at the native size.

        Raises:
            UserError: the denoiser of this config cannot be called.
        """
        return _trace(self, config_text(config), latent_size or self.native_latent_size(config))


def config_of(net: Net) -> dict[str, Any]:
    """Returns the config of a model, which may be compiled, with the name of its class."""
    bare = getattr(net, "_orig_mod", net)
    # FSDP replaces the class of a model by a subclass of diffusers' class.
    stock = next(cls for cls in type(bare).__mro__ if cls.__module__.startswith("diffusers."))
    return {**bare.config, "_class_name": stock.__name__}


def config_text(config: Config) -> str:
    """Returns a config as a text that can be the key of a cache."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


@lru_cache(maxsize=32)
def _skeleton(architecture: Architecture, text: str) -> Any:
    with torch.device("meta"):
        return architecture.make(json.loads(text)).eval().requires_grad_(False)


@lru_cache(maxsize=32)
@torch.no_grad()
def _trace(architecture: Architecture, text: str, latent_size: tuple[int, int]) -> Trace:
    config, net, trace = json.loads(text), architecture.skeleton(json.loads(text)), Trace({}, {}, 0)

    def note(name: str, module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            trace.shapes[name] = tuple(first.shape[1:])
        if isinstance(output, Tensor) and not any(module.children()):
            trace.leaf_elements += output.numel()

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in net.named_modules()]
    try:
        with FlopCounterMode(display=False) as counter:
            net(**architecture.example_inputs(config, latent_size=latent_size, device="meta"))
    except Exception as error:  # any kind of error, since diffusers does not check the values
        why = str(error) or type(error).__name__
        raise UserError(
            f"The {architecture.class_name} of this config cannot be called: {why}: fetch or copy it again"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    trace.flops |= {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    return trace


def check_shapes(architecture: Architecture, teacher: Config, student: Config, pairs: Sequence[Pair]) -> None:
    """Compares the output shapes of each pair on the meta device, so that training does not fail at step 1.

    Raises:
        UserError: the outputs of a pair have different shapes.
    """
    ours, theirs = architecture.trace(student).shapes, architecture.trace(teacher).shapes
    for pair in pairs:
        if ours[pair.student] != theirs[pair.teacher]:
            raise UserError(
                f"{pair.student} of the student gives {ours[pair.student]} and {pair.teacher} of the teacher "
                f"{theirs[pair.teacher]}, which cannot be compared: choose another losses.level"
            )
