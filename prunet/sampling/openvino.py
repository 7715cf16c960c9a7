"""Pictures from a folder that `prunet export --openvino` wrote, drawn by openvino_genai on the CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunet import extras
from prunet.errors import UserError
from prunet.recipe.values import Drawing
from prunet.sampling.runtime_folder import Part, RuntimeFolder, RuntimePipeline
from prunet.teacher.space import check_size

#: The name of a part's model in its folder.
MODEL = "openvino_model.xml"
#: Samplers (`prunet.sampling.samplers`) that openvino_genai also has.
SAMPLERS = ("ddim", "ddim-trailing", "pndm", "euler", "euler-a", "lcm")


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


class OpenVinoFolder(RuntimeFolder):
    """A folder for OpenVINO, not open yet."""

    runtime, form, package = "OpenVINO", "openvino", "openvino_genai"
    model, weights, samplers = MODEL, "openvino_model.bin", SAMPLERS

    def precision_of(self, dtype: torch.dtype) -> str:
        """Returns OpenVINO's precision for a dtype of torch; before it how weights are stored, if in 8 bits."""
        bits = self.facts.get("bits")
        return f"{bits} in {precision_of(dtype)}" if bits else precision_of(dtype)

    def pipeline(self, dtype: torch.dtype) -> RuntimePipeline:
        """Opens the folder with openvino_genai."""
        return OpenVinoPipeline(self.folder, precision_of(dtype))

    def open_parts(self, dtype: torch.dtype) -> dict[str, Part]:
        """Compiles each model."""
        core, settings = need("openvino").Core(), properties(precision_of(dtype))

        def opened(path: Path) -> Part:
            compiled = core.compile_model(path, "CPU", settings)
            return lambda given: list(compiled(given).values())

        return {path.parent.name: opened(path) for path in sorted(self.folder.glob(f"*/{MODEL}"))}


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
