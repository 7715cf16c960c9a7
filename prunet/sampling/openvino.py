"""Pictures from a folder that `prunet export --openvino` wrote, drawn by openvino_genai on the CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunet import extras
from prunet.denoisers.known import architecture_of
from prunet.errors import UserError
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import overridden, read_made_for
from prunet.teacher.configs import check_config, read_object
from prunet.teacher.runtimes import runtime_of
from prunet.teacher.space import check_size

#: The name of a part's model in its folder.
MODEL = "openvino_model.xml"
#: Samplers (`prunet.sampling.samplers`) that openvino_genai also has.
SAMPLERS = ("ddim", "ddim-trailing", "pndm", "euler", "euler-a", "lcm")


def is_openvino(folder: Path | str) -> bool:
    """Returns whether a folder is a pipeline for OpenVINO."""
    return runtime_of(folder) == "OpenVINO"


def need(package: str) -> Any:
    """Imports a package of the extra `openvino`.

    Raises:
        UserError: it is not installed.
    """
    return extras.need(package, "openvino", "OpenVINO")


def precision_of(dtype: torch.dtype) -> str:
    """Returns OpenVINO's precision for a dtype of torch."""
    return "f32" if dtype == torch.float32 else "bf16"


def properties(precision: str) -> dict[str, Any]:
    """Returns OpenVINO's settings: a precision of `bf16` or `f32`, and as many threads as torch has."""
    return {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}


class OpenVinoFolder:
    """The facts in the files of a folder for OpenVINO, without opening its models.

    `made_for`: how to draw with it; `native_size`: the side of its pictures in pixels. Other names are like a
    teacher's.

    Raises:
        UserError: prunet did not write the folder, or it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = self.folder = Path(folder)
        self._fix = fix = f"{folder}: export it again with `prunet export RUN --openvino`"
        made_for = read_made_for(folder / "model_index.json", fix)
        if made_for is None or made_for.sampler not in SAMPLERS:
            raise UserError(f"{folder}: its model_index.json does not say how to draw with it: {fix}")
        self.made_for: Drawing = made_for
        self.unet_config, decoder = (read_object(folder / p / "config.json", fix) for p in ("unet", "vae_decoder"))
        check_config("unet", self.unet_config, folder / "unet" / "config.json")
        check_config("vae", decoder, folder / "vae_decoder" / "config.json")
        self.architecture = architecture_of(self.unet_config)
        self.vae_scale = int(2 ** (len(decoder.get("block_out_channels", ())) - 1))
        self.native_size = self.vae_scale * self.architecture.native_latent_size(self.unet_config)[0]

    @property
    def facts(self) -> dict[str, Any]:
        """The measurements of its export (`prunet.exports.openvino.export_openvino`)."""
        return read_object(self.folder / "openvino.json", self._fix)

    def check_weights(self) -> None:
        """Refuses a folder that lacks the weights of a part."""
        for path in self.folder.glob(f"*/{MODEL}"):
            if not path.with_suffix(".bin").is_file():
                raise UserError(f"{path}: no {path.with_suffix('.bin').name} beside it: {self._fix}")

    def drawing_of(self, asked: Drawing | None = None) -> Drawing:
        """Returns how to draw: the values that `asked` sets, and otherwise those that it was made for.

        Raises:
            UserError: `asked` has another sampler than the folder.
        """
        how = overridden(self.made_for, asked)
        if how.sampler != self.made_for.sampler:
            raise UserError(f"sampler: {self.folder} draws only with {self.made_for.sampler}: leave it out")
        return how


class OpenVinoPipeline(OpenVinoFolder):
    """A folder for OpenVINO, opened to draw with as many threads as torch has.

    `precision`: `bf16` or `f32`; a CPU without bf16 computes in f32.

    Raises:
        UserError: openvino_genai is not installed, or cannot open the folder.
    """

    def __init__(self, folder: Path | str, precision: str = "bf16") -> None:
        genai, ov = need("openvino_genai"), need("openvino")
        super().__init__(folder)
        self._noise = _noise(genai, ov)
        try:
            self._pipe = genai.Text2ImagePipeline(str(folder), "CPU", **properties(precision))
        except RuntimeError as error:
            raise UserError(f"{folder}: openvino_genai cannot open it ({error}): {self._fix}") from error

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], how: Drawing, size: int | None = None
    ) -> Iterator[Image.Image]:
        """Draws a picture for each prompt, one after the other, from the same noise as diffusers for this seed.

        Raises:
            UserError: the levels of the U-Net cannot halve this size in pixels.
        """
        size = size or self.native_size
        check_size(self, size, "size")
        for prompt, seed in zip(prompts, seeds, strict=True):
            drawn = self._pipe.generate(
                prompt,
                num_inference_steps=how.steps,
                guidance_scale=how.guidance_scale,
                width=size,
                height=size,
                generator=self._noise(seed),
            )
            yield Image.fromarray(np.array(drawn.data[0]))


def _noise(genai: Any, ov: Any) -> Any:
    class Noise(genai.Generator):  # type: ignore[misc]
        """Gives openvino_genai torch's noise for a seed."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self._generator = torch.Generator().manual_seed(seed)

        def next(self) -> float:
            return float(torch.randn((), generator=self._generator))

        def randn_tensor(self, shape: Sequence[int]) -> Any:
            return ov.Tensor(torch.randn(list(shape), generator=self._generator).numpy())

    return Noise
