"""Folders that `prunet export` wrote for runtimes other than torch: their facts, and what is alike for each runtime."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from numpy.typing import NDArray
from PIL import Image

from prunet.denoisers.known import architecture_of
from prunet.errors import UserError
from prunet.extras import need
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import overridden, read_made_for
from prunet.sampling.samplers import check_sampler
from prunet.teacher.configs import check_config, read_object

Arrays: TypeAlias = dict[str, NDArray[Any]]
#: A model of a folder: from its inputs by name to its outputs.
Part: TypeAlias = Callable[[Arrays], list[NDArray[Any]]]


class RuntimeFolder(ABC):
    """The facts in the files of a folder for another runtime, without opening its models; a subclass for each runtime.

    - `runtime`: its name; `form`: the form of `prunet export` and the extra; `package`: the module that computes.
    - `model`, `weights`: the names of the files of a part.
    - `samplers` (`prunet.sampling.samplers`): those that a folder can be made for.
    - `made_for`: how to draw with it; `native_size`: the side of its pictures in pixels. Other names are like a
      teacher's.

    Raises:
        UserError: the runtime is not installed, prunet did not write the folder, or it is damaged.
    """

    runtime: ClassVar[str]
    form: ClassVar[str]
    package: ClassVar[str]
    model: ClassVar[str]
    weights: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path | str) -> None:
        need(self.package, self.form, self.runtime)
        folder = self.folder = Path(folder)
        self._fix = fix = f"export it again with `prunet export RUN --{self.form}`"
        made_for = read_made_for(folder / "model_index.json", str(folder), fix)
        if made_for is None or made_for.sampler not in self.samplers:
            raise UserError(f"{folder}: its model_index.json does not say how to draw with it: {fix}")
        self.made_for: Drawing = made_for
        self.unet_config = self._read("unet/config.json")
        self.vae_config = self._read("vae_decoder/config.json")
        check_config("unet", self.unet_config, folder / "unet" / "config.json")
        check_config("vae", self.vae_config, folder / "vae_decoder" / "config.json")
        self.architecture = architecture_of(self.unet_config)
        self.vae_scale = int(2 ** (len(self.vae_config.get("block_out_channels", ())) - 1))
        self.native_size = self.vae_scale * self.architecture.native_latent_size(self.unet_config)[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What its export wrote about it (`prunet.exports.openvino.export_openvino`, for example)."""
        return self._read(f"{self.form}.json")

    @property
    def tokens(self) -> int:
        """The number of tokens of a prompt, with padding."""
        return int(self._read("tokenizer/tokenizer_config.json")["model_max_length"])

    def _read(self, name: str) -> dict[str, Any]:
        return read_object(self.folder / name, str(self.folder), self._fix)

    def check_weights(self) -> None:
        """Refuses a folder that lacks the weights of a part."""
        for path in self.folder.glob(f"*/{self.model}"):
            if not path.with_name(self.weights).is_file():
                raise UserError(f"{path}: no {self.weights} beside it: {self._fix}")

    def drawing_of(self, asked: Drawing | None = None) -> Drawing:
        """Returns how to draw: the values that `asked` sets, and otherwise those that it was made for.

        Raises:
            UserError: `asked` has another sampler than the folder, or more steps than it can draw in.
        """
        how = overridden(self.made_for, asked)
        if how.sampler != self.made_for.sampler:
            raise UserError(f"sampler: {self.folder} draws only with {self.made_for.sampler}: leave it out")
        schedule = self._read("scheduler/scheduler_config.json")
        check_sampler(how.sampler, how.steps, schedule, str(self.folder))
        return how

    @abstractmethod
    def precision_of(self, dtype: torch.dtype) -> str:
        """Returns in which precision the folder computes if `dtype` is asked for."""

    @abstractmethod
    def pipeline(self, dtype: torch.dtype) -> "RuntimePipeline":
        """Opens the folder to draw.

        Raises:
            UserError: the runtime cannot open it.
        """

    @abstractmethod
    def open_parts(self, dtype: torch.dtype) -> dict[str, Part]:
        """Opens each model by itself, with as many threads as torch has; returns them by the names of their folders."""


class RuntimePipeline(Protocol):
    """A folder that is open to draw."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], how: Drawing, size: int | None = None
    ) -> Iterator[Image.Image]:
        """Draws a picture for each prompt, one after the other, from the same noise as diffusers for this seed.

        Raises:
            UserError: the levels of the U-Net cannot halve this size in pixels.
        """
