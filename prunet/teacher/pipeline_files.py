"""The files of a pipeline: paths, configs and fingerprint, without loading a weight.

Only this file and `prunet.teacher.teacher` know what differs between SD v1, v2 and SDXL: one or two text encoders,
micro-conditioning, epsilon or v-prediction, the scaling factor.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunet.denoisers.architecture import Architecture
from prunet.denoisers.known import architecture_of
from prunet.errors import UserError
from prunet.hashing import file_hash, hash_of
from prunet.teacher import hub, marks, placing, scheduler
from prunet.teacher.configs import check_config, read_object
from prunet.teacher.known import LAYOUTS, layout_config
from prunet.teacher.runtimes import RUNTIMES, runtime_of
from prunet.teacher.tokens import unusual_tokens, vocabulary_files
from prunet.teacher.weight_files import WEIGHTS, find_weights
from prunet.words import command

if TYPE_CHECKING:  # imported on use, because reading a config takes one second, importing diffusers several
    from diffusers import DDPMScheduler

PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
CLASSES = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


class PipelineFiles:
    """A Stable Diffusion pipeline as files.

    It is a diffusers folder, a single `.safetensors` file with its configs, a repository of the hub, or the name of a
    known layout (a config without weights).

    Args:
        source: path, hub id, or layout.
        config: for a single file: the folder or hub id with configs, tokenizers and scheduler. Without it, the folder
            `NAME.config` beside the file is used, else the hub.
        revision: the revision of a hub id.
        only_form: also accept denoisers that prunet can only plan and build students of, not train.

    Raises:
        UserError: there is nothing to open, or prunet cannot compress it.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        config: str | Path | None = None,
        revision: str | None = None,
        only_form: bool = False,
    ) -> None:
        self.source = str(source)
        self._revision = revision
        self.file: Path | None = None  # the weights, if they are a single file
        self.hub: str | None = None  # the repository, if `_folder` is downloaded on demand
        self.commit: str | None = None  # the commit of `hub`, after a download
        self._folder: Path | None = None  # configs, tokenizers, scheduler; and the weights if not in `file`
        self._part = "unet"  # the denoiser's folder in `_folder`
        self._fingerprints: dict[str, str] = {}
        path = Path(source)
        if path.is_file():
            self._open_file(path, config)
        elif config is not None and (path.is_dir() or path.suffix != ".safetensors"):
            raise UserError(
                f"{self.source}: --config (in a recipe teacher.config) is for a single .safetensors file; a folder, "
                "hub id or layout has its own configs: leave it out"
            )
        elif path.is_dir():
            self._folder = path
            self._read_index()
        elif self.source in LAYOUTS:
            self.kind = "sdxl" if self.source == "sdxl" else "sd"  # unused for transformers
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and path.suffix != ".safetensors":
            self.hub = self.source
            self._folder = self.download("*.json", "*/*.json", "tokenizer*/*")
            self._read_index()
        else:
            raise UserError(
                f"No teacher at {self.source}: give a diffusers folder, a .safetensors file, a hub id (owner/name), "
                f"or a layout's name ({', '.join(LAYOUTS)}) to inspect a plan"
            )
        if revision is not None and self.hub is None:
            raise UserError(
                f"{self.source}: teacher.revision {revision!r} is only for a repository of the hub: leave it out, or "
                "give the hub id"
            )
        if self.architecture.only_form and not only_form:
            raise UserError(
                f"{self.source}: its denoiser is a {self.architecture.class_name}; prunet can plan and build students "
                "of it (prunet inspect, prunet build), but not train, draw, measure or export them"
            )

    def _open_file(self, path: Path, config: str | Path | None) -> None:
        if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise UserError(
                f"{path} is a pickle, which can run code when it is opened; {command('convert', path)} writes its "
                f"tensors as {path.with_suffix('.safetensors').name} without running code"
            )
        if path.suffix == ".gguf":
            raise UserError(f"{path}: a file for stable-diffusion.cpp, which only `prunet bench --sd-cpp` draws with")
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: not a .safetensors file or a diffusers folder")
        self.file = path
        beside = path.with_suffix(".config")
        config = config or (beside if beside.is_dir() else None)
        if config is not None:
            if Path(config).is_dir():
                self._folder = Path(config)
            else:
                self.hub = str(config)
                self._folder = self.download("*.json", "*/*.json", "tokenizer*/*")
            self._read_index()
            if self.architecture.only_form:
                raise UserError(
                    f"{path}: prunet opens single files of SD v1, v2 and SDXL; give the "
                    f"{self.architecture.class_name} as a diffusers folder"
                )
            self._check_marks(path, str(config))
            return
        from prunet.teacher import ldm

        layout = ldm.layout_of(path)
        if layout is None:
            raise UserError(
                f"{path}: its tensors are not those of a whole SD v1, v2 or SDXL; if it is a pruned or small one, give "
                "its configs with --config (in a recipe teacher.config), a diffusers folder without weights"
            )
        self.kind = "sdxl" if layout == "sdxl" else "sd"
        self._layout = layout
        said = marks.check_marks(path, {}, f"the configs of {LAYOUTS[layout]}", layout)
        if layout == "sd-v2" and not any(mark.field == marks.PREDICTION for mark in said):
            raise UserError(
                f"{path}: an SD v2 checkpoint that does not say what it predicts: give its configs with --config (in a "
                f"recipe teacher.config), such as {LAYOUTS['sd-v2']} (epsilon, 512 px)"
            )
        if missing := ldm.lacks(path, layout):
            raise UserError(f"{path} has no {missing}*, a part that {layout} needs: give the whole checkpoint")
        if not ldm.has_unet(path, layout_config(layout)):
            raise UserError(
                f"{path}: its U-Net is not the whole {layout}, but pruned or with other inputs: give its configs with "
                "--config (in a recipe teacher.config), a diffusers folder without weights"
            )

    def _check_marks(self, path: Path, config: str) -> None:
        """Refuses a config with a scheduler that disagrees with the marks of the file."""
        if marks.read_marks(path):
            marks.check_marks(path, self.part_config("scheduler"), f"the scheduler of {config}", self.layout)

    def _read_index(self) -> None:
        assert self._folder is not None
        if runtime := runtime_of(self._folder):
            raise UserError(
                f"{self._folder}: a pipeline for {runtime}, which {RUNTIMES[runtime][1]} draws with: give the folder "
                "or run that it was made from"
            )
        index = read_object(self._folder / "model_index.json", f"{self._folder} is not a diffusers pipeline folder")
        check_config("model_index", index, self._folder / "model_index.json")
        if index.get("transformer"):
            self._part = self.kind = "transformer"
            if self.architecture.part != self._part:
                raise UserError(f"{self._folder}: a {self.architecture.class_name} in the folder {self._part}")
            return
        name = index.get("_class_name")
        if not isinstance(name, str) or name not in PIPELINES:
            raise UserError(f"{self._folder}: a {name}; prunet compresses {' and '.join(PIPELINES)}")
        self.kind = PIPELINES[name]
        unet, vae = self.part_config("unet"), self.part_config("vae")
        if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(f"{self._folder}: its VAE is a {vae['_class_name']}; prunet supports AutoencoderKL")
        for key in ("latents_mean", "latents_std", "shift_factor"):
            if vae.get(key) is not None:
                raise UserError(
                    f"{self._folder / 'vae' / 'config.json'}: its latents have {key}, Stable Diffusion's do not; "
                    "prunet supports latents with only a scaling_factor"
                )
        if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
            raise UserError(
                f"{self._folder}: the U-Net takes {unet.get('in_channels', 4)} channels and the VAE makes "
                f"{vae.get('latent_channels', 4)}; inpainting and other conditioned U-Nets are not supported"
            )

    def check_index(self) -> None:
        """Refuses a `model_index.json` that gives a part another class than the one prunet loads.

        Raises:
            UserError: the message names the part and both classes.
        """
        path = self.configs() / "model_index.json"
        index = read_object(path, self.source)
        known = {self.architecture.part: self.architecture.class_name, **CLASSES}
        for part in self.parts:
            pair = index.get(part)
            if (given := pair[1] if isinstance(pair, list) else None) != known[part]:
                raise UserError(
                    f"{path}: {part}: {given}; prunet supports {known[part]}: fetch or copy it again, or correct it"
                )

    def configs(self) -> Path:
        """Returns the folder with configs and tokenizers; a single file without one downloads it at first use."""
        if self._folder is None:
            if self.file is None:
                raise UserError(f"{self.source} is the name of a layout, without weights: give a checkpoint instead")
            self.hub = self.hub or LAYOUTS[self._layout]
            self._folder = self.download("*.json", "*/*.json", "tokenizer*/*")
        return self._folder

    def download(self, *patterns: str) -> Path:
        """Downloads the repository's files that match a pattern; returns its folder on this machine.

        Raises:
            UserError: the files are not available.
        """
        assert self.hub is not None
        folder = hub.download(self.hub, self.commit or self._revision, patterns)
        self.commit = folder.name  # all files must come from one commit, but a branch may move on
        return folder

    def part_config(self, part: str) -> dict[str, Any]:
        """Reads and checks the `config.json` (scheduler: `scheduler_config.json`) of a part."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = read_object(self.configs() / part / name, f"{self.source} has no readable {part}/{name}")
        check_config(part, config, self.configs() / part / name)
        return config

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The denoiser's config, without fields that its class does not know."""
        if self._folder is None:
            return layout_config(self._layout if self.file else self.source)
        import diffusers

        config = self.part_config(self._part)
        known = placing.known_fields(getattr(diffusers, architecture_of(config).class_name), config)
        ours = {key for key in config if key.startswith("_")} - {"_diffusers_version", "_name_or_path"}
        return {key: value for key, value in config.items() if key in known or key in ours}

    @property
    def architecture(self) -> Architecture:
        """The architecture of the denoiser."""
        return architecture_of(self.unet_config)

    @property
    def layout(self) -> str:
        """`sd-v1`, `sd-v2` or `sdxl`: the original layout of a single file of this pipeline, pruned or not."""
        if self.kind == "sdxl":
            return "sdxl"
        return "sd-v2" if self.unet_config.get("use_linear_projection") else "sd-v1"

    @cached_property
    def noise_scheduler(self) -> "DDPMScheduler":
        """The scheduler of the teacher's training; `config.prediction_type` says what the teacher predicts."""
        return scheduler.noise_scheduler(self.part_config("scheduler"), self.source)

    @property
    def hub_id(self) -> str | None:
        """The repository of the weights, or None if they are not from the hub."""
        return self.hub if self.file is None else None

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance compares with zeros, as SDXL's base does, and not with embeddings of the empty prompt."""
        if self.kind != "sdxl":
            return False
        index = read_object(self.configs() / "model_index.json", self.source)
        return bool(index.get("force_zeros_for_empty_prompt", True))

    @property
    def scaling_factor(self) -> float:
        """The factor for latents before the denoiser gets them."""
        return float(self.part_config("vae").get("scaling_factor", 0.18215))

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.part_config("vae")["block_out_channels"]) - 1))

    @property
    def native_size(self) -> int:
        """Side of the pictures that the teacher was trained on, in pixels."""
        return self.architecture.native_latent_size(self.unet_config)[0] * self.vae_scale

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders that prunet loads."""
        if self.architecture.only_form:
            return ()
        return ("text_encoder", "text_encoder_2") if self.kind == "sdxl" else ("text_encoder",)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts with weights that prunet uses, the denoiser first."""
        return (self.architecture.part, *(() if self.architecture.only_form else ("vae", *self.text_encoders)))

    # -- files and fingerprint

    def _part_files(self, part: str) -> list[Path]:
        weights = [self.file] if self.file is not None else self.weight_files(part)
        vocabulary = vocabulary_files(self.tokenizer_folder(part)) if part.startswith("text_encoder") else []
        return [*weights, self.configs() / part / "config.json", *vocabulary]

    def tokenizer_folder(self, text_encoder: str) -> Path:
        """Returns the folder of a text encoder's tokenizer."""
        return self.configs() / text_encoder.replace("text_encoder", "tokenizer")

    def fingerprint(self, parts: Iterable[str] | None = None) -> str:
        """Returns a hash of the files of `parts` (by default all that prunet uses): weights, configs and tokenizers.

        It does not depend on where the files are: they are sorted by their names in the folder, a single file last.
        """
        parts = sorted(parts or self.parts)
        folder, found = self.configs(), []
        files = {p for part in parts for p in self._part_files(part)}
        for path in sorted(files, key=lambda p: (p == self.file, p if p == self.file else p.relative_to(folder))):
            key = str(path)
            if key not in self._fingerprints:
                self._fingerprints[key] = file_hash(path)
            found.append(self._fingerprints[key].encode())
        for part in parts:
            if part.startswith("text_encoder"):  # usual ones are left out, so that older caches stay the same
                unusual = unusual_tokens(self.tokenizer_folder(part), self.part_config(part))
                found += [json.dumps({part: unusual}).encode()] if unusual else []
        return hash_of(found)[:16]

    def weight_files(self, part: str) -> list[Path]:
        """Returns the safetensors files of a part (`find_weights`), downloaded if needed."""
        folder, stem = self.configs() / part, WEIGHTS[part]
        if self.hub is not None and not (folder / f"{stem}.safetensors").is_file():
            self.download(f"{part}/{stem}.safetensors")
            if not (folder / f"{stem}.safetensors").is_file():
                self.download(f"{part}/{stem}*.safetensors*")
        return find_weights(folder, stem, self.source, part)

    def weights_here(self, part: str) -> bool:
        """Returns whether a local folder has safetensors for a part."""
        return self.hub is None and self._folder is not None and any((self._folder / part).glob("*.safetensors*"))
