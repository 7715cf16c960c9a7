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

#: Samplers (`prunet.sampling.samplers`) that openvino_genai has, too.
SAMPLERS = ("ddim", "ddim-trailing", "pndm", "euler", "euler-a", "lcm")


def is_openvino(folder: Path | str) -> bool:
    """Returns whether a folder is a pipeline for OpenVINO."""
    return runtime_of(folder) == "OpenVINO"


def need(package: str) -> Any:
    """Imports a package of the extra `openvino`.

    Raises:
        UserError: not installed.
    """
    return extras.need(package, "openvino", "OpenVINO")


class OpenVinoPipeline:
    """A folder for OpenVINO, opened to draw with as many threads as torch has.

    `precision`: of the computation, `bf16` or `f32`; a CPU without bf16 computes in f32.

    Raises:
        UserError: openvino_genai is not installed, or the folder is not one that prunet wrote, or damaged.
    """

    def __init__(self, folder: Path | str, precision: str = "bf16") -> None:
        folder = self.folder = Path(folder)
        genai, self._ov = need("openvino_genai"), need("openvino")
        fix = f"{folder}: export it again with `prunet export RUN --openvino`"
        made_for = read_made_for(folder / "model_index.json", fix)
        if made_for is None or made_for.sampler not in SAMPLERS:
            raise UserError(f"{folder}: its model_index.json does not say how to draw with it: {fix}")
        #: How to draw with it, and the side of its pictures in pixels.
        self.made_for: Drawing = made_for
        unet, decoder = (read_object(folder / part / "config.json", fix) for part in ("unet", "vae_decoder"))
        check_config("vae", decoder, folder / "vae_decoder" / "config.json")
        architecture, scale = architecture_of(unet), 2 ** (len(decoder.get("block_out_channels", ())) - 1)
        self.native_size = int(scale * architecture.native_latent_size(unet)[0])
        self._step = int(scale * architecture.side_step(unet))
        self._noise = _noise(genai, self._ov)
        threads = torch.get_num_threads()
        try:
            self._pipe = genai.Text2ImagePipeline(
                str(folder), "CPU", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=threads
            )
        except RuntimeError as error:
            raise UserError(f"{folder}: openvino_genai cannot open it ({error}): {fix}") from error

    def drawing_of(self, asked: Drawing | None = None) -> Drawing:
        """Returns how to draw: by the values that `asked` sets, else as it was made for.

        Raises:
            UserError: with another sampler than that of the folder.
        """
        how = overridden(self.made_for, asked)
        if how.sampler != self.made_for.sampler:
            raise UserError(f"sampler: {self.folder} draws with its own, {self.made_for.sampler}: leave it out")
        return how

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], how: Drawing, size: int | None = None
    ) -> Iterator[Image.Image]:
        """Draws a picture for each prompt, one after the other, from the noise that diffusers draws from its seed.

        Raises:
            UserError: a size in pixels that the levels of the U-Net cannot halve.
        """
        size = size or self.native_size
        if size % self._step:
            raise UserError(f"size: {size} is not a multiple of {self._step}, which the levels of this U-Net need")
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
        """Gives openvino_genai torch's noise of a seed."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self._generator = torch.Generator().manual_seed(seed)

        def next(self) -> float:
            return float(torch.randn((), generator=self._generator))

        def randn_tensor(self, shape: Sequence[int]) -> Any:
            return ov.Tensor(torch.randn(list(shape), generator=self._generator).numpy())

    return Noise
