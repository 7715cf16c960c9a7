"""Pictures from a folder that `prunet export --onnx` wrote, drawn by ONNX Runtime on the CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prunet.denoisers.unet2d.guidance import guidance_embedding
from prunet.errors import UserError
from prunet.extras import need
from prunet.recipe.values import Drawing
from prunet.sampling.runtime_folder import Arrays, Part, RuntimeFolder, RuntimePipeline
from prunet.sampling.samplers import sampler_of
from prunet.teacher.space import check_size

#: The name of a part's model in its folder.
MODEL = "model.onnx"
#: Samplers (`prunet.sampling.samplers`) of examples/edge/draw_onnx.py.
SAMPLERS = ("ddim", "ddim-trailing", "lcm")


class OnnxFolder(RuntimeFolder):
    """A folder of ONNX models, not open yet."""

    runtime, form, package = "ONNX Runtime", "onnx", "onnxruntime"
    model, weights, samplers = MODEL, f"{MODEL}.data", SAMPLERS

    def precision_of(self, dtype: torch.dtype) -> str:
        """Returns f32, in which the models are."""
        return "f32"

    def pipeline(self, dtype: torch.dtype) -> RuntimePipeline:
        """Opens the folder."""
        return OnnxPipeline(self.folder)

    def open_parts(self, dtype: torch.dtype) -> dict[str, Part]:
        """Opens each model."""
        return {path.parent.name: self._opened(path) for path in sorted(self.folder.glob(f"*/{MODEL}"))}

    def _opened(self, path: Path) -> Part:
        runtime = need(self.package, self.form, self.runtime)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # classes of its own for each kind of damage
            raise UserError(f"{path}: ONNX Runtime cannot open it ({error}): {self._fix}") from error
        return lambda given: list(session.run(None, given))


class OnnxPipeline(OnnxFolder):
    """A folder of ONNX models, opened to draw with as many threads as torch has.

    Raises:
        UserError: ONNX Runtime is not installed, or cannot open the folder.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        self._parts = self.open_parts(torch.float32)
        self._schedule = self._read("scheduler/scheduler_config.json")
        index = self._read("model_index.json")
        self._zeros = "text_encoder_2" in self._parts and bool(index.get("force_zeros_for_empty_prompt", True))

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
            latents = self._latents(prompt, torch.Generator().manual_seed(seed), how, size)
            given = {"latent_sample": (latents / self.vae_config["scaling_factor"]).numpy()}
            pixels = self._parts["vae_decoder"](given)[0][0].transpose(1, 2, 0)
            yield Image.fromarray(((pixels / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))

    def _latents(self, prompt: str, generator: torch.Generator, how: Drawing, size: int) -> Tensor:
        scheduler: Any = sampler_of(how.sampler, self._schedule)
        scheduler.set_timesteps(how.steps)
        side = size // self.vae_scale
        latents = torch.randn(1, self.vae_config["latent_channels"], side, side, generator=generator)
        texts = self._encode(["", prompt][-how.rows :], size)
        if self.architecture.takes_guidance(self.unet_config):
            texts["timestep_cond"] = guidance_embedding(torch.tensor([how.guidance_scale])).numpy()
        for t in scheduler.timesteps:
            sample = latents.repeat(how.rows, 1, 1, 1).numpy()
            out = torch.from_numpy(self._parts["unet"]({"sample": sample, "timestep": t[None].numpy(), **texts})[0])
            if how.rows > 1:
                out = out[:1] + how.guidance_scale * (out[1:] - out[:1])
            latents = scheduler.step(out, t, latents, generator=generator, return_dict=False)[0]
        return latents

    def _encode(self, prompts: Sequence[str], size: int) -> Arrays:
        """Returns the inputs of the U-Net for prompts; with SDXL's two encoders, also sizes of the picture."""
        from tokenizers import Tokenizer

        found = []
        for name in sorted(name for name in self._parts if name.startswith("text_encoder")):
            tokenizer = Tokenizer.from_file(
                str(self.folder / name.replace("text_encoder", "tokenizer") / "tokenizer.json")
            )
            ids = np.array([encoded.ids for encoded in tokenizer.encode_batch(list(prompts))], np.int64)
            found.append(self._parts[name]({"input_ids": ids}))
        if len(found) == 1:
            return {"encoder_hidden_states": found[0][0]}
        texts = {"encoder_hidden_states": np.concatenate([out[-2] for out in found], -1), "text_embeds": found[1][0]}
        if self._zeros and len(prompts) > 1:
            texts = {name: np.concatenate([np.zeros_like(value[:1]), value[1:]]) for name, value in texts.items()}
        return texts | {"time_ids": np.array([[size, size, 0, 0, size, size]] * len(prompts), np.float32)}
