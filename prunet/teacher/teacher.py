"""The teacher: a Stable Diffusion pipeline, opened part by part and frozen.

What differs between SD v1, v2 and SDXL (one or two text encoders, micro-conditioning, epsilon or v-prediction, the
scaling factor, a VAE that must stay in fp32) is settled in this file and nowhere else.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from prunet.console import say
from prunet.denoisers.freeze import freeze
from prunet.disk.reading import parse_json
from prunet.errors import UserError
from prunet.teacher import placing, text_names
from prunet.teacher.conditioning import PromptEmbeds
from prunet.teacher.configs import check_config
from prunet.teacher.known import HUB_CONFIGS, LAYOUTS, layout_config

if TYPE_CHECKING:  # imported when used: a config can be read in a second, diffusers takes several
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


class Teacher:
    """A frozen Stable Diffusion pipeline.

    Args:
        source: a diffusers folder, a single `.safetensors` file (SD v1, v2, SDXL), a hub id, or the name of a known
            layout (a config without weights).
        config: for a single file: the folder or hub id with configs, tokenizers and scheduler. Without it, the folder
            `NAME.config` beside the file is used, else the hub.
        revision: of a hub id.
        device, dtype: where parts are put when they are loaded, and in which precision.

    Raises:
        UserError: nothing to open there, or nothing that prunet can compress.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        config: str | Path | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = str(source)
        self.device = torch.device(device)
        self.dtype = dtype
        self._revision = revision
        self._file: Path | None = None  # the weights, if they are one file
        self._hub: str | None = None  # the repository, if `_folder` is filled on demand
        self._folder: Path | None = None  # configs, tokenizers, scheduler; and the weights if not in `_file`
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
            self.kind = "sdxl" if self.source == "sdxl" else "sd"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and path.suffix != ".safetensors":
            self._hub = self.source
            self._folder = self._download("*.json", "*/*.json", "tokenizer*/*")
            self._read_index()
        else:
            raise UserError(
                f"No teacher at {self.source}: give a diffusers folder, a .safetensors file, a hub id (owner/name), "
                f"or a layout's name ({', '.join(LAYOUTS)}) to inspect a plan"
            )

    # -- what it is, from configs alone

    def _open_file(self, path: Path, config: str | Path | None) -> None:
        if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
            raise UserError(
                f"{path} is a pickle, which can run code when it is opened; `prunet convert {path}` writes its tensors "
                f"as {path.with_suffix('.safetensors').name} without running any"
            )
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: not a .safetensors file or a diffusers folder")
        self._file = path
        beside = path.with_suffix(".config")
        config = config or (beside if beside.is_dir() else None)
        if config is not None:
            if Path(config).is_dir():
                self._folder = Path(config)
            else:
                self._hub = str(config)
                self._folder = self._download("*.json", "*/*.json", "tokenizer*/*")
            self._read_index()
            self._check_marks(path, str(config))
            return
        from prunet.teacher import ldm, marks

        layout = ldm.layout_of(path)
        if layout is None:
            raise UserError(
                f"{path}: not a checkpoint of SD v1, v2 or SDXL that prunet knows by its tensors; if it is a pruned "
                "or small one, give its configs with teacher.config (a diffusers folder without weights)"
            )
        self.kind = "sdxl" if layout == "sdxl" else "sd"
        self._layout = layout
        said = marks.check_marks(path, {}, f"the configs of {HUB_CONFIGS[layout]}", layout)
        if layout == "sd-v2" and not any(mark.field == marks.PREDICTION for mark in said):
            raise UserError(
                f"{path}: an SD v2 checkpoint that does not say what it predicts: give its configs with --config (in a "
                f"recipe teacher.config), such as {HUB_CONFIGS['sd-v2']} (epsilon, 512 px)"
            )
        if missing := ldm.lacks(path, layout):
            raise UserError(f"{path} has no {missing}* in it, a part that {layout} needs: give the whole checkpoint")
        if not ldm.has_unet(path, layout_config(layout)):
            raise UserError(
                f"{path}: a U-Net that is not the whole {layout}, pruned or with other inputs: give its configs with "
                "--config or teacher.config (a diffusers folder without weights)"
            )

    def _check_marks(self, path: Path, config: str) -> None:
        """Refuses a config whose scheduler says something else than the file that it was given with."""
        from prunet.teacher import marks

        if marks.read_marks(path):
            marks.check_marks(path, self.part_config("scheduler"), f"the scheduler of {config}", self.layout)

    def _read_index(self) -> None:
        assert self._folder is not None
        index = _read_json(self._folder / "model_index.json", f"{self._folder} is not a diffusers pipeline folder")
        check_config("model_index", index, self._folder / "model_index.json")
        name = index.get("_class_name")
        if not isinstance(name, str) or name not in PIPELINES:
            raise UserError(f"{self._folder}: a {name}; prunet compresses {' and '.join(PIPELINES)}")
        self.kind = PIPELINES[name]
        _check_names(index, self._folder / "model_index.json")
        unet, vae = self.part_config("unet"), self.part_config("vae")
        if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(f"{self._folder}: its VAE is a {vae['_class_name']}; prunet knows AutoencoderKL")
        for key in ("latents_mean", "latents_std", "shift_factor"):
            if vae.get(key) is not None:
                raise UserError(
                    f"{self._folder / 'vae' / 'config.json'}: its latents have {key}, Stable Diffusion's do not; "
                    "prunet knows latents with a scaling_factor alone"
                )
        if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
            raise UserError(
                f"{self._folder}: the U-Net takes {unet.get('in_channels', 4)} channels and the VAE makes "
                f"{vae.get('latent_channels', 4)}; inpainting and other conditioned U-Nets are not supported"
            )

    def _configs(self) -> Path:
        """The folder with configs and tokenizers, fetched for a bare single file when first needed."""
        if self._folder is None:
            if self._file is None:
                raise UserError(f"{self.source} is the name of a layout, without weights: give a checkpoint instead")
            self._hub = self._hub or HUB_CONFIGS[self._layout]
            self._folder = self._download("*.json", "*/*.json", "tokenizer*/*")
        return self._folder

    def _download(self, *patterns: str) -> Path:
        from huggingface_hub import snapshot_download

        assert self._hub is not None
        try:
            return Path(snapshot_download(self._hub, revision=self._revision, allow_patterns=list(patterns)))
        except Exception as error:  # the hub client's, its HTTP library's, the disk's
            raise UserError(
                f"{self._hub}: neither a folder here nor to be had from the hub ({type(error).__name__}); check the "
                "name, the network, and `hf auth login` if it is gated"
            ) from error

    def part_config(self, part: str) -> dict[str, Any]:
        """The `config.json` (scheduler: `scheduler_config.json`) of a part."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = _read_json(self._configs() / part / name, f"{self.source} has no readable {part}/{name}")
        check_config(part, config, self._configs() / part / name)
        return config

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        if self._folder is None:
            return layout_config(self._layout if self._file else self.source)
        from diffusers import UNet2DConditionModel

        config = self.part_config("unet")
        known = placing.known_fields(UNet2DConditionModel, config)
        ours = {key for key in config if key.startswith("_")} - {"_diffusers_version", "_name_or_path"}
        return {key: value for key, value in config.items() if key in known or key in ours}

    @property
    def layout(self) -> str:
        """`sd-v1`, `sd-v2` or `sdxl`: whose original layout a single file of it has, pruned or not."""
        if self.kind == "sdxl":
            return "sdxl"
        return "sd-v2" if self.unet_config.get("use_linear_projection") else "sd-v1"

    @cached_property
    def noise_scheduler(self) -> "DDPMScheduler":
        """The forward process that the teacher was trained with; `config.prediction_type` says what it predicts."""
        from diffusers import DDPMScheduler

        config = self.part_config("scheduler")
        name = str(config.get("_class_name"))
        if name.startswith(("EDM", "FlowMatch")):  # DDPMScheduler would take the config, with another meaning
            raise UserError(f"{self.source}: trained for {name}; prunet knows the noise schedule of SD v1, v2 and SDXL")
        scheduler = _from_config(DDPMScheduler, config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.source}: prediction type {scheduler.config.prediction_type!r} is not supported")
        kept = scheduler.alphas_cumprod
        if not bool(((kept >= 0) & (kept <= 1)).all()):  # nor where it is no number
            raise UserError(f"{self.source}: the betas of scheduler/scheduler_config.json are no noise schedule")
        return scheduler

    @property
    def hub_id(self) -> str | None:
        """The repository that its weights come from, if they do."""
        return self._hub if self._file is None else None

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance compares with zeros, not with the embeddings of the empty prompt (SDXL's base does)."""
        if self.kind != "sdxl":
            return False
        index = _read_json(self._configs() / "model_index.json", self.source)
        return bool(index.get("force_zeros_for_empty_prompt", True))

    @property
    def scaling_factor(self) -> float:
        return float(self.part_config("vae").get("scaling_factor", 0.18215))

    @property
    def vae_scale(self) -> int:
        """Pixels to a latent, along one side."""
        return 2 ** (len(self.part_config("vae")["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """Side of the pictures that the teacher was made for, in pixels."""
        from prunet.denoisers.unet2d.calls import native_latent_size

        return native_latent_size(self.unet_config)[0] * self.vae_scale

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.kind == "sdxl" else ("text_encoder",)

    # -- who it is

    def _part_files(self, part: str) -> list[Path]:
        weights = [self._file] if self._file is not None else self._weight_files(part)
        vocabulary = self._vocabulary_files(part) if part.startswith("text_encoder") else []
        return [*weights, self._configs() / part / "config.json", *vocabulary]

    def _vocabulary_files(self, text_encoder: str) -> list[Path]:
        """What a text encoder's tokenizer splits texts by; without it every text would become the same tokens."""
        folder = self._configs() / text_encoder.replace("text_encoder", "tokenizer")
        whole = [folder / "tokenizer.json"], [folder / "vocab.json", folder / "merges.txt"]
        found = [path for files in whole if all(p.is_file() and p.stat().st_size for p in files) for path in files]
        if not found:
            raise UserError(
                f"{folder}: no vocab.json and merges.txt (or tokenizer.json): fetch or copy the tokenizer again"
            )
        return found

    def fingerprint(self, parts: Iterable[str] | None = None) -> str:
        """A hash of the weights, configs and tokenizers of `parts` (all trained ones by default), from the files.

        It does not depend on where they lie: their order is that of their names in the folder, a single file last.
        """
        parts = sorted(parts or ("unet", "vae", *self.text_encoders))
        digest, folder = hashlib.sha256(), self._configs()
        files = {p for part in parts for p in self._part_files(part)}
        for path in sorted(files, key=lambda p: (p == self._file, p if p == self._file else p.relative_to(folder))):
            key = str(path)
            if key not in self._fingerprints:
                with path.open("rb") as file:
                    self._fingerprints[key] = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(self._fingerprints[key].encode())
        return digest.hexdigest()[:16]

    # -- its parts, loaded when first used

    def _weight_files(self, part: str) -> list[Path]:
        """The safetensors of a part: one file or its shards, else those of its variant; a pickle does not count."""
        folder, stem = self._configs() / part, WEIGHTS[part]
        if self._hub is not None and not (folder / f"{stem}.safetensors").is_file():
            self._download(f"{part}/{stem}.safetensors")
            if not (folder / f"{stem}.safetensors").is_file():
                self._download(f"{part}/{stem}*.safetensors*")
        file, index = _weight_names(folder, stem)
        # Where both lie there, transformers reads the one file, diffusers the shards.
        if index.is_file() and not (part.startswith("text_encoder") and file.is_file()):
            names = _read_json(index, f"{self.source}: {part}").get("weight_map")
            names = set(names.values()) if isinstance(names, dict) else set()
            if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise UserError(f"{index}: its weight_map names no files beside it: fetch or copy it again")
            return [folder / name for name in sorted(names)]
        if file.is_file():
            return [file]
        target, pickles = folder / f"{stem}.safetensors", sorted(folder.glob("*.bin"))
        advice = "; its .bin files are pickles: save the pipeline with safe_serialization" if pickles else ""
        if len(pickles) == 1:
            advice = f"; {pickles[0].name} is a pickle: `prunet convert {pickles[0]} -o {target}`"
        raise UserError(f"{self.source}: no {part}/{target.name}{advice}")

    def check_weights(self, *, headers_only: bool = False) -> None:
        """Refuses what cannot be used, before it is: tokenizers and weights that are not there, that do not fit their
        configs tensor for tensor, or that hold numbers that are not finite.

        `headers_only`: reads no weight and fetches nothing, and a folder may have configs alone, to look at a plan.
        """
        parts: tuple[str, ...] = ("unet", "vae", *self.text_encoders)
        if headers_only:
            if self._file is None and not any(self._weights_here(part) for part in parts):
                return
            parts = parts if self._folder is not None else ("unet",)  # the other configs are on the hub
        else:
            self._configs()  # fetched where they are not here
        if self._folder is not None:
            for part in self.text_encoders:
                self._vocabulary_files(part)
                if not headers_only:
                    open_tokenizer(self._folder / part.replace("text_encoder", "tokenizer"))
        for part in parts:
            placed = self._place(part)
            if not headers_only:
                placing.check_finite(placed)

    def _weights_here(self, part: str) -> bool:
        return self._hub is None and self._folder is not None and any((self._folder / part).glob("*.safetensors*"))

    def _place(self, part: str, model: Any = None) -> placing.Placed:
        """Where each tensor of a part lies: in the single file, or in those of its folder. `model`: an empty one."""
        from prunet.denoisers.unet2d import form as unet
        from prunet.teacher import ldm

        if model is None:  # the U-Net's is there already where a plan was looked at
            model = unet.skeleton(self.unet_config) if part == "unet" else self._empty(part)
        if self._file is None:
            placed = placing.place(model, placing.headers(self._weight_files(part)))
            _tell(placed)
            return placed
        layout = ldm.layout_of(self._file)
        if layout is not None and (layout == "sdxl") != (self.kind == "sdxl"):
            raise UserError(
                f"{self._file}: its tensors are of {layout}, its configs in {self._configs()} of a "
                f"{self.kind.upper()} pipeline: give its own with --config or teacher.config"
            )
        placed = ldm.place(self._file, model, self.text_encoders.index(part) if part.startswith("text") else 0)
        _tell(placed)
        if others := ldm.unused(self._file):
            counts = ", ".join(f"{name} ({count:,})" for name, count in sorted(others.items()))
            _say_once(f"{self._file}: tensors that are of no part of a pipeline are not used: {counts}")
        return placed

    def _empty(self, part: str) -> Any:
        where = f"{self.source}: {part}/config.json"
        if part in ("unet", "vae"):
            import diffusers

            config = self.unet_config if part == "unet" else self.part_config(part)
            return placing.empty(getattr(diffusers, CLASSES[part]), config, where)
        import transformers

        cls = getattr(transformers, CLASSES[part])
        self.part_config(part)  # refuses what transformers would take, and make without end
        try:
            text_config = transformers.CLIPTextConfig.from_pretrained(self._configs() / part)
        except Exception as error:  # of any kind: transformers takes the values as they are
            raise UserError(f"{where} makes no {cls.__name__} ({error})") from error
        return placing.empty(cls, text_config, where)

    def _load(self, part: str, dtype: torch.dtype | None = None) -> nn.Module:
        model, dtype = self._empty(part), dtype or self.dtype
        placed = self._place(part, model)
        module = nn.Module.to(placing.fill(model, placed), self.device, dtype)
        if bad := next((name for name, tensor in module.state_dict().items() if not placing.is_finite(tensor)), None):
            placing.check_finite(placed)
            path, key = placed.places[bad]
            raise UserError(f"{path}: {key} has numbers that {dtype} cannot hold: {after_overflow(dtype)}")
        return freeze(module)

    @cached_property
    def unet(self) -> "UNet2DConditionModel":
        return self._load("unet")  # type: ignore[return-value]

    @cached_property
    def vae(self) -> "AutoencoderKL":
        """The autoencoder; in fp32 where its config says that half precision overflows (SDXL)."""
        upcast = self.part_config("vae").get("force_upcast", False)
        vae = self._load("vae", torch.float32 if upcast else None)
        vae.enable_slicing()  # type: ignore[operator]  # one picture at a time: at 1024 px a batch would take many GB
        return vae  # type: ignore[return-value]

    @cached_property
    def _text_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for part in self.text_encoders:
            tokenizer = part.replace("text_encoder", "tokenizer")
            parts[tokenizer] = open_tokenizer(self._configs() / tokenizer)
            parts[part] = self._load(part)
        return parts

    def text_part(self, name: str) -> nn.Module:
        """A text encoder by its name in the pipeline."""
        return self._text_parts[name]

    def save_parts(self, folder: Path) -> None:
        """Writes all of the pipeline but the U-Net into `folder`: the teacher's own weights, byte for byte.

        But text encoders get the names that every client reads (`prunet.teacher.text_names`), and of a single file
        the VAE and the text encoders are written by diffusers, in the precision of this teacher.
        """
        configs = self._configs()
        index = _read_json(configs / "model_index.json", self.source)
        for name in [n for n, value in index.items() if isinstance(value, list) and n != "unet"]:
            if index[name][0] is None:
                continue
            if name in WEIGHTS and (self._file is not None or self._place(name).renamed):
                if name == "vae":
                    self.vae.save_pretrained(folder / name, safe_serialization=True)
                else:
                    text_names.save_text_encoder(self.text_part(name), folder / name)
            elif name in WEIGHTS:
                (folder / name).mkdir()
                self._copy_config(configs, name, folder)
                files = self._weight_files(name)
                copy = text_names.copy if name.startswith("text_encoder") else shutil.copyfile
                for file in files:
                    target = file.name if len(files) > 1 else f"{WEIGHTS[name]}.safetensors"
                    copy(file, folder / name / target)
                if len(files) > 1:
                    _, index_file = _weight_names(configs / name, WEIGHTS[name])
                    copy(index_file, folder / name / f"{WEIGHTS[name]}.safetensors.index.json")
            elif not self._copy_other(configs, name, folder):
                index[name] = [None, None]
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
        index.pop("_name_or_path", None)
        if "safety_checker" in index and index["safety_checker"][0] is None:
            index["requires_safety_checker"] = False
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _copy_config(self, configs: Path, name: str, folder: Path) -> None:
        """The config as it is, but for a text encoder stored in half precision.

        transformers would load that in half by default while diffusers loads the U-Net in full, and the stock
        pipeline, opened without a dtype, would fail at its first matmul.
        """
        config = _read_json(configs / name / "config.json", self.source)
        for key in ("dtype", "torch_dtype"):
            if name.startswith("text_encoder") and key in config:
                config[key] = "float32"
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _copy_other(self, configs: Path, name: str, folder: Path) -> bool:
        """Copies a part without weights that prunet loads (tokenizer, scheduler, safety checker); False: not there."""
        files = self._other_files(configs, name)
        for file in files:
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name / file.name)
        return bool(files)

    def _other_files(self, configs: Path, name: str) -> list[Path]:
        if self._hub is not None:
            self._download(f"{name}/*.json", f"{name}/*.txt", f"{name}/model.safetensors")
        files = [p for p in (configs / name).glob("*") if p.suffix in (".json", ".txt", ".safetensors", ".model")]
        weights = any(p.suffix == ".safetensors" for p in files)
        return [] if name == "safety_checker" and not weights else files

    def check_other_parts(self) -> None:
        """Refuses what stock diffusers could not load of the parts that are copied as they are (`_copy_other`): it
        opens just those files with it. Else that would be found at the export, after all the training.

        Raises:
            UserError: such a part, or one of which the index says another class than prunet loads.
        """
        import diffusers

        configs = self._configs()
        index = _read_json(configs / "model_index.json", self.source)
        ours = ("vae", *self.text_encoders)
        for part in ours:
            if (given := (index.get(part) or [None, None])[1]) != CLASSES[part]:
                raise UserError(f"{configs / 'model_index.json'}: {part}: {given}; prunet knows {CLASSES[part]}")
        with TemporaryDirectory() as made:
            for name in [n for n, value in index.items() if isinstance(value, list) and n not in (*ours, "unet")]:
                if index[name][0] is None:
                    continue
                (Path(made) / name).mkdir()
                files = self._other_files(configs, name)
                for file in files:
                    (Path(made) / name / file.name).symlink_to(file.absolute())
                if not files:
                    _say_once(f"{configs}: {name} is left out: no safetensors or JSON in its folder to copy")
                    index[name] = [None, None]
            if index.get("safety_checker", ["?"])[0] is None:
                index["requires_safety_checker"] = False
            (Path(made) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
            diffusers.utils.logging.disable_progress_bar()
            try:
                diffusers.DiffusionPipeline.from_pretrained(
                    made, local_files_only=True, unet=None, **dict.fromkeys(ours)
                )
            except Exception as error:  # of any kind: whatever the classes of the parts raise
                lines = str(error).replace(made, str(configs)).splitlines() or [""]
                raise UserError(
                    f"{configs}: stock diffusers cannot open the parts that the student takes over "
                    f"({type(error).__name__}: {lines[0][:300]}): fix that part, or delete its line in model_index.json"
                ) from error
            finally:
                diffusers.utils.logging.enable_progress_bar()

    def release(self, *parts: str) -> None:
        """Forget loaded parts (`unet`, `vae`, `text`), so that their memory can be used for something else."""
        for part in parts:
            self.__dict__.pop("_text_parts" if part == "text" else part, None)

    # -- what it does

    def pipeline(self, **parts: Any) -> "DiffusionPipeline":
        """A stock pipeline of the teacher's parts, with `parts` (such as `unet=student`) in place of its own."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        for name in ("unet", "vae"):
            if name not in parts:
                parts[name] = getattr(self, name)
        common = {
            **parts,
            "scheduler": _scheduler(self.part_config("scheduler")),
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

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, unconditional: bool = False) -> PromptEmbeds:
        """Embeddings of prompts, exactly as the stock pipeline makes them when it draws.

        `unconditional`: what guidance compares with instead (SDXL: zeros where its pipeline says so); the texts are
        then only counted.
        """
        pipe = self.pipeline(unet=None, vae=None)
        out = pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=unconditional,
        )
        pick = 1 if unconditional else 0
        return PromptEmbeds(out[pick], out[2 + pick] if self.kind == "sdxl" else None)

    def are_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt has more tokens than the text encoders read; `encode_prompts` drops the rest of it."""
        if not prompts:
            return []
        tokenizers = [part for name, part in self._text_parts.items() if name.startswith("tokenizer")]
        tokens = [(t(list(prompts), verbose=False).input_ids, t.model_max_length) for t in tokenizers]
        return [any(len(ids[i]) > limit for ids, limit in tokens) for i in range(len(prompts))]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, 4, h, w) of the latents of `pixels` (B, 3, H, W) in [-1, 1], scaled."""
        vae = self.vae
        dist = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return dist.mean.float() * self.scaling_factor, dist.std.float() * self.scaling_factor


def open_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer in a folder.

    Raises:
        UserError: none that can be read there, or one without words, which would make the same tokens of every text.
    """
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        known = [tokenizer(word).input_ids for word in ("apple", "horse")]
    except Exception as error:
        raise UserError(f"{folder}: no readable tokenizer: {error}") from error
    if known[0] == known[1]:
        raise UserError(f"{folder}: its tokenizer takes all words for one: fetch or copy it again")
    return tokenizer


def _weight_names(folder: Path, stem: str) -> tuple[Path, Path]:
    """The weights' one file and the index of their shards, as stock diffusers would look for one or the other.

    Without a variant (`fp16`, `non_ema`) where there is one of them, else of the only variant, or of fp16.

    Raises:
        UserError: several variants to choose from.
    """
    found = {_variant(file.name, stem) for file in folder.glob(f"{stem}.*")} if folder.is_dir() else set()
    variants = sorted(variant for variant in found if variant)
    if None in found or not variants:
        return folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if len(variants) > 1 and "fp16" not in variants:
        raise UserError(
            f"{folder}: weights in the variants {', '.join(variants)}, and none without; copy the one that you want to "
            f"{stem}.safetensors"
        )
    variant = "fp16" if "fp16" in variants else variants[0]
    return folder / f"{stem}.{variant}.safetensors", folder / f"{stem}.safetensors.index.{variant}.json"


def _variant(name: str, stem: str) -> str | None:
    """`fp16` of `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`;
    "" of a file that is none of the part's weights."""
    if not (
        found := re.fullmatch(rf"{stem}(?:\.(\w+))?(-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", name)
    ):
        return ""
    return found[1] or found[3]


def after_overflow(dtype: torch.dtype) -> str:
    """What to try where finite weights give what is not finite."""
    if dtype == torch.float32:
        return "full precision does not hold it either, so the weights are damaged: fetch or copy them again"
    return "try --precision no" + (", or bf16" if dtype == torch.float16 else "")


def _check_names(index: dict[str, Any], path: Path) -> None:
    """A part is a folder beside `model_index.json`, and nowhere else."""
    for part, value in index.items():
        if not isinstance(value, list):
            continue
        is_pair = len(value) == 2 and all(item is None or isinstance(item, str) for item in value)
        if not re.fullmatch(r"\w+", part) or not is_pair:
            raise UserError(
                f"{path}: {part!r}: {value}: a part has a name of letters, digits and _, a library and a class: fetch "
                "or copy it again"
            )


def _tell(placed: placing.Placed) -> None:
    """Says which names are read as others, where stock diffusers would not."""
    if placed.renamed:
        key, name = next(iter(placed.renamed.items()))
        path = next(path for path, other in placed.places.values() if other == key)
        _say_once(f"{path}: {key} is read as {name}, and {len(placed.renamed) - 1:,} more names likewise")


@cache
def _say_once(text: str) -> None:
    say(escape(text))


def _scheduler(config: dict[str, Any]) -> Any:
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise UserError(f"The teacher's scheduler {config.get('_class_name')!r} is not one of diffusers'")
    return _from_config(cls, config)


def _from_config(cls: Any, config: dict[str, Any]) -> Any:
    try:
        return cls.from_config(config)
    except Exception as error:  # of any kind: diffusers takes the numbers as they are
        raise UserError(f"The teacher's scheduler/scheduler_config.json makes no {cls.__name__} ({error})") from error


def _read_json(path: Path, message: str) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{message}: no file {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{message}: {path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{message}: {path} holds no JSON object")
    return value
