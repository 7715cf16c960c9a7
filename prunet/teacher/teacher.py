"""The teacher: a Stable Diffusion pipeline with frozen parts, loaded one by one."""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from prunet.console import quiet_libraries, say
from prunet.denoisers.condition import Condition
from prunet.denoisers.freeze import freeze
from prunet.errors import UserError
from prunet.recipe.prompts import check_prompts
from prunet.teacher import placing
from prunet.teacher.pipeline_files import CLASSES, PipelineFiles
from prunet.teacher.process import DDPM
from prunet.teacher.scheduler import from_config, scheduler_class
from prunet.teacher.tokens import vocabulary_files
from prunet.teacher.weight_files import WEIGHTS, variant_of

if TYPE_CHECKING:  # imported on use, because reading a config takes one second, importing diffusers several
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

#: The parts that are loaded one by one: denoiser, VAE, text encoders with their tokenizers.
PARTS = ("unet", "vae", "text")


class Teacher(PipelineFiles):
    """A frozen Stable Diffusion pipeline.

    Args:
        source: a diffusers folder, a .safetensors file, a hub id, or the name of a layout.
        config: for a single file: folder or hub id with its configs and tokenizers.
        revision: branch, tag or commit of a hub id.
        only_form: also open a model that prunet can plan for but not train or draw with yet.
        only_draw: also open a model that takes the guidance scale as an input, with which prunet can only draw.
        device: device of loaded parts.
        dtype: precision of loaded parts.

    Raises:
        UserError: there is nothing to open, or prunet cannot compress it.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        config: str | Path | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        only_form: bool = False,
        only_draw: bool = False,
    ) -> None:
        super().__init__(source, config=config, revision=revision, only_form=only_form)
        if not only_draw and self.architecture.takes_guidance(self.unet_config):
            raise UserError(
                f"{self.source}: its {self.architecture.part} takes the guidance scale as an input; prunet can draw "
                "with it and measure it, but not train it or write it in another form: give another model, such as a "
                "student of one guidance_scale"
            )
        self.device, self.dtype = torch.device(device), dtype

    @property
    def prediction(self) -> str | None:
        """What the denoiser predicts, by the scheduler's config; None where that config is not at hand."""
        here = self._folder is not None and (self._folder / "scheduler" / "scheduler_config.json").is_file()
        return str(self.noise_scheduler.config.prediction_type) if here and not self.architecture.only_form else None

    def check_weights(self, *, headers_only: bool = False) -> None:
        """Refuses unusable files before anything is done with them.

        Checks that the index, the scheduler, tokenizers and weights exist, that the weights fit their configs tensor
        for tensor, and that all their numbers are finite. `headers_only`: reads no weights and downloads nothing; a
        folder may have only configs, to look at a plan.

        Raises:
            UserError: a file is unusable (the first mistake).
        """
        parts = self.parts
        here = self.file is not None or any(self.weights_here(part) for part in parts)
        if not headers_only:
            self.configs()  # downloads them if needed
        if self._folder is not None and (here or self.hub) and not self.architecture.only_form:
            self.check_index()
            _ = self.noise_scheduler
        if headers_only:
            if not here:
                return
            parts = parts if self._folder is not None else parts[:1]  # the configs of the others are on the hub
        if self._folder is not None:
            for part in self.text_encoders:
                vocabulary_files(self.tokenizer_folder(part))
                if not headers_only:
                    self._check_tokenizer(part)
        for part in parts:
            placed = self.place(part)
            if not headers_only:
                placing.check_finite(placed)

    def _check_tokenizer(self, part: str) -> None:
        """Refuses a tokenizer that makes more tokens, or more kinds of tokens, than its text encoder `part` accepts."""
        folder, config = self.tokenizer_folder(part), self.part_config(part)
        tokenizer = open_tokenizer(folder)
        sides = (
            ("tokens at once", tokenizer.model_max_length, config.get("max_position_embeddings", 77)),
            ("kinds of tokens", len(tokenizer), config.get("vocab_size", 49408)),
        )
        for what, given, most in sides:
            if given > most:
                raise UserError(
                    f"{folder}: makes {given:,} {what}, its {part} accepts {most:,}: copy the tokenizer (with its "
                    "tokenizer_config.json) from the same pipeline as the text encoder"
                )

    def place(self, part: str, model: Any = None) -> placing.Placed:
        """Finds the tensors of a part in the teacher's files. `model`: the part without weights, if it exists already.

        Raises:
            UserError: the tensors of the files are not exactly those of the part.
        """
        from prunet.teacher import ldm

        if model is None:
            is_denoiser = part == self.architecture.part
            model = self.architecture.skeleton(self.unet_config) if is_denoiser else self.empty(part)
        if self.file is None:
            files = self.weight_files(part)
            placed = placing.place(model, placing.headers(files))
            _tell(placed)
            if variant := variant_of(files[0].name, WEIGHTS[part]):
                say_once(f"{self.source}: reading the weights of the variant {variant}, because there are no others")
            return placed
        layout = ldm.layout_of(self.file)
        if layout is not None and (layout == "sdxl") != (self.kind == "sdxl"):
            raise UserError(
                f"{self.file}: its tensors are of {layout}, its configs in {self.configs()} of a "
                f"{self.kind.upper()} pipeline: give its own with --config (in a recipe teacher.config)"
            )
        placed = ldm.place(self.file, model, self.text_encoders.index(part) if part.startswith("text") else 0)
        _tell(placed)
        if others := ldm.unused(self.file):
            counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(others.items()))
            say_once(f"{self.file}: tensors that belong to no part of a pipeline are not used: {counts}")
        return placed

    def empty(self, part: str) -> Any:
        """A part without its weights, which are on the meta device."""
        if part == self.architecture.part:
            return self.architecture.empty(self.unet_config)
        where = f"{self.source}: {part}/config.json"
        if part == "vae":
            import diffusers

            return placing.empty(getattr(diffusers, CLASSES[part]), self.part_config(part), where)
        import transformers

        cls = getattr(transformers, CLASSES[part])
        self.part_config(part)  # refuses sizes that transformers would try to build
        try:
            text_config = transformers.CLIPTextConfig.from_pretrained(self.configs() / part)
        except Exception as error:  # any type of error, since transformers does not check the values
            raise UserError(f"{where} makes no {cls.__name__} ({error})") from error
        return placing.empty(cls, text_config, where)

    def _load(self, part: str, dtype: torch.dtype | None = None) -> nn.Module:
        model, dtype = self.empty(part), dtype or self.dtype
        placed = self.place(part, model)
        module = nn.Module.to(placing.fill(model, placed), self.device, dtype)
        if bad := next((name for name, tensor in module.state_dict().items() if not placing.is_finite(tensor)), None):
            placing.check_finite(placed)
            path, key = placed.places[bad]
            raise UserError(f"{path}: {key} has numbers that {dtype} cannot hold: {after_overflow(dtype)}")
        frozen: nn.Module = freeze(module)
        return frozen

    @cached_property
    def unet(self) -> "UNet2DConditionModel":
        """The denoiser."""
        return self._load(self.architecture.part)

    @cached_property
    def vae(self) -> "AutoencoderKL":
        """The autoencoder; in fp32 if its config says that half precision overflows (SDXL)."""
        upcast = self.part_config("vae").get("force_upcast", False)
        vae = self._load("vae", torch.float32 if upcast else None)
        vae.enable_slicing()  # type: ignore[operator]  # one picture at a time: at 1024 px a batch would take many GB
        return vae

    @cached_property
    def _text_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for part in self.text_encoders:
            tokenizer = part.replace("text_encoder", "tokenizer")
            parts[tokenizer] = open_tokenizer(self.configs() / tokenizer)
            parts[part] = self._load(part)
        return parts

    def text_part(self, name: str) -> nn.Module:
        """Returns a text encoder by its name in the pipeline."""
        part: nn.Module = self._text_parts[name]
        return part

    def release(self, *parts: str) -> None:
        """Drops loaded parts (`unet`, `vae`, `text`) to free their memory."""
        for part in parts:
            self.__dict__.pop("_text_parts" if part == "text" else part, None)

    @quiet_libraries()
    def pipeline(self, **parts: Any) -> "DiffusionPipeline":
        """Makes a stock pipeline of the teacher's parts; `parts` (such as `unet=student`) replace its own."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        for name in ("unet", "vae"):
            if name not in parts:
                parts[name] = getattr(self, name)
        common = {
            **parts,
            "scheduler": from_config(scheduler_class(config := self.part_config("scheduler")), config),
            **self._text_parts,
        }
        if self.kind == "sdxl":
            zeros = {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt}
            pipe = StableDiffusionXLPipeline(**common, **zeros, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(
                **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @quiet_libraries()
    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, unconditional: bool = False) -> Condition:
        """Embeds prompts, exactly as the stock pipeline does when it draws.

        `unconditional`: returns instead, for equally many prompts, the condition of no prompt
        (`zeros_for_empty_prompt`).
        """
        pipe = self.pipeline(unet=None, vae=None)
        out = pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=unconditional,
        )
        pick = 1 if unconditional else 0
        pooled = {"pooled": out[2 + pick]} if self.kind == "sdxl" else {}
        return Condition(prompt_embeds=out[pick], **pooled)

    def size_condition(self, sizes: Sequence[tuple[int, ...]]) -> Condition:
        """Returns SDXL's `time_ids` (B, 6), or nothing for other teachers.

        `sizes`: original height and width, crop top and left, target height and width of each picture, in pixels.
        """
        if self.kind != "sdxl":
            return Condition()
        return Condition(time_ids=torch.tensor(sizes, dtype=torch.float32, device=self.device))

    @cached_property
    def process(self) -> DDPM:
        """The diffusion process of the teacher's training."""
        scheduler = self.noise_scheduler
        return DDPM(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def are_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Returns whether each prompt has more tokens than the text encoders read; `encode_prompts` drops the rest."""
        if not prompts:
            return []
        tokenizers = [part for name, part in self._text_parts.items() if name.startswith("tokenizer")]
        tokens = [(t(list(prompts), verbose=False).input_ids, t.model_max_length) for t in tokenizers]
        return [any(len(ids[i]) > limit for ids, limit in tokens) for i in range(len(prompts))]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuses prompts that are not text, and reports those that the text encoder will cut.

        Raises:
            UserError: a prompt is not text (the first such prompt).
        """
        prompts = list(dict.fromkeys(prompts))
        check_prompts(prompts, "prompt")
        for prompt, cut in zip(prompts, self.are_cut(prompts), strict=True):
            if cut:
                say(
                    f"[yellow]{escape(repr(prompt[:40]))}... is cut:[/] it is longer than the text encoder reads: put "
                    "the most important words first"
                )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and std (B, 4, h, w) of the scaled latents of `pixels` (B, 3, H, W) in [-1, 1]."""
        vae = self.vae
        dist = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return dist.mean.float() * self.scaling_factor, dist.std.float() * self.scaling_factor


def open_tokenizer(folder: Path) -> Any:
    """Opens the CLIP tokenizer in a folder.

    Raises:
        UserError: the tokenizer is not readable, or has no words, so that every text would give the same tokens.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        known = [tokenizer(word).input_ids for word in ("apple", "horse")]
    except Exception as error:
        raise UserError(f"{folder}: not a readable tokenizer ({error}): fetch or copy it again") from error
    if known[0] == known[1]:
        raise UserError(f"{folder}: its tokenizer gives the same tokens for all words: fetch or copy it again")
    return tokenizer


def after_overflow(dtype: torch.dtype) -> str:
    """Returns advice for finite weights that give numbers which are not finite."""
    if dtype == torch.float32:
        return "full precision cannot hold them, so the weights are damaged: fetch or copy them again"
    return "try --precision no" + (", or bf16" if dtype == torch.float16 else "")


def _tell(placed: placing.Placed) -> None:
    """Reports keys that are read under other names, which stock diffusers does not do."""
    if placed.renamed:
        key, name = next(iter(placed.renamed.items()))
        path = next(path for path, other in placed.places.values() if other == key)
        say_once(f"{path}: {key} is read as {name}, and {len(placed.renamed) - 1:,} more names in the same way")


@cache
def say_once(text: str) -> None:
    """Prints a line, but only once in this process."""
    say(escape(text))
