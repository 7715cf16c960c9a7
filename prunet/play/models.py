"""Models that draw side by side, with a LoRA if asked, and are timed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from PIL import Image

from prunet.adapters.adapt import adapt, carry
from prunet.errors import UserError, one_line
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.recipe.prompts import check_prompts
from prunet.recipe.recipe import load_recipe
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.sampling.draw import Model, draw, open_any
from prunet.sampling.made_for import drawing_of, made_for
from prunet.sampling.runtime_folder import RuntimeFolder, RuntimePipeline
from prunet.sampling.start import StartPicture, start_from
from prunet.speed.clock import weights_mb, working_mb
from prunet.teacher.space import check_size
from prunet.teacher.teacher import Teacher
from prunet.words import config_for, names_of


@dataclass(frozen=True)
class Asked:
    """What all models draw, from `start` if there is one.

    `drawing`: how, unless a model has its own settings. `lora`: a LoRA of the teacher.
    """

    prompt: str
    seed: int
    size: int
    drawing: Drawing
    start: StartPicture | None = None
    lora: Path | None = None


@dataclass(frozen=True)
class Drawn:
    """A picture, its time in seconds, and the peak memory in MiB with the weights (None if unknown)."""

    picture: Image.Image
    seconds: float
    peak_memory_mb: float | None
    drawing: Drawing


@dataclass
class TorchPlayer:
    """A model with its name on the page. `run`: its run, if it is a student of one."""

    name: str
    opened: Teacher
    run: Path | None = None
    _lora: Path | None = field(default=None, init=False)

    @cached_property
    def pipe(self) -> Any:
        """The stock pipeline; a LoRA stays loaded until another is asked for."""
        return self.opened.pipeline()

    @property
    def made_for(self) -> Drawing | None:
        """The settings that it was made for, which override those of a request; None if there are none."""
        return made_for(self.opened)

    def draw(self, asked: Asked) -> Drawn:
        """Draws the picture.

        Raises:
            UserError: a setting does not fit this model.
        """
        self.opened.check_prompts([asked.prompt])
        how = _at_scale(drawing_of(self.opened, asked.drawing), asked)
        self._use(asked.lora)
        start = None
        if (given := asked.start) is not None:
            pictures, strength, mask = [given.picture], given.strength, given.mask
            start = start_from(self.opened, pictures, size=asked.size, steps=how.steps, strength=strength, mask=mask)
        seconds = 0.0
        out: list[Image.Image] = []

        def call() -> None:
            nonlocal seconds
            began = time.perf_counter()
            out.extend(draw(self.pipe, [asked.prompt], [asked.seed], how, size=asked.size, start=start))
            seconds = time.perf_counter() - began  # the picture is decoded, so the device has finished

        working = working_mb(call, self.opened.device)
        if not out:  # the system does not report the memory of a process
            call()
        parts = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        return Drawn(out[0], seconds, None if working is None else working + sum(map(weights_mb, parts)), how)

    def _use(self, lora: Path | None) -> None:
        """Loads a LoRA in place of the one before. For a run's student it is carried over by the plan of the run.

        Raises:
            UserError: the file is not a LoRA, or not for this model.
        """
        if lora == self._lora:
            return
        if self._lora is not None:
            self.pipe.unload_lora_weights()
            self._lora = None
        if lora is None:
            return
        with TemporaryDirectory() as folder:
            file = Path(folder) / "lora.safetensors"
            if self.run is None:
                kind = carry(lora, derive(self.opened.unet_config, Plan("none"))).what
                file.symlink_to(lora.resolve())
            else:
                kind = adapt(lora, self.run, file)["kind"]
            if kind != "LoRA":
                raise UserError(f"{lora.name}: a {kind}; the page takes a LoRA")
            try:
                self.pipe.load_lora_weights(folder, weight_name=file.name)
            except Exception as error:  # diffusers and peft raise errors of many kinds
                self.pipe.unload_lora_weights()
                raise UserError(f"{lora.name}: diffusers cannot load it ({one_line(str(error))[:200]})") from error
        self._lora = lora


@dataclass
class RuntimePlayer:
    """A folder for another runtime with its name on the page."""

    name: str
    opened: RuntimeFolder
    dtype: torch.dtype

    @cached_property
    def pipe(self) -> RuntimePipeline:
        """The folder, opened to draw."""
        return self.opened.pipeline(self.dtype)

    @property
    def made_for(self) -> Drawing:
        """How it draws."""
        return self.opened.made_for

    def draw(self, asked: Asked) -> Drawn:
        """Draws the picture.

        Raises:
            UserError: a picture to start from or a LoRA was asked for.
        """
        extra = "picture to start from" if asked.start is not None else "LoRA" if asked.lora is not None else None
        if extra is not None:
            raise UserError(f"{self.name}: a pipeline for {self.opened.runtime} draws without {extra}: leave it out")
        check_prompts([asked.prompt], "prompt")
        pipe, began = self.pipe, time.perf_counter()
        how = _at_scale(self.made_for, asked)
        [picture] = pipe.draw([asked.prompt], [asked.seed], how, asked.size)
        return Drawn(picture, time.perf_counter() - began, None, how)


def _at_scale(how: Drawing, asked: Asked) -> Drawing:
    """Returns `how`, at the learned scale nearest to the one asked for if the model takes it as an input."""
    return how.nearest(asked.drawing.guidance_scale) if isinstance(how, EmbeddedGuidance) else how


Player: TypeAlias = TorchPlayer | RuntimePlayer


def open_players(models: Sequence[str], *, config: str | None = None, device: Any, dtype: torch.dtype) -> list[Player]:
    """Opens one or two models; for a single run, its teacher and its student.

    Raises:
        UserError: a model cannot be opened, or two models draw pictures of different sizes.
    """
    runs = [Path(model) if (Path(model) / "recipe.yaml").is_file() else None for model in models]
    players: list[Player] = []
    for name, model, run in zip(names_of(models), models, runs, strict=True):
        opened = open_any(Model(model, config_for(model, config, models), device, dtype))
        if isinstance(opened, RuntimeFolder):
            players.append(RuntimePlayer(name, opened, dtype))
        else:
            players.append(TorchPlayer(name, opened, run))
    if len(players) == 1 and runs[0] is not None:
        recipe = load_recipe(runs[0] / "recipe.yaml")
        source = recipe.stages[-1].teacher or recipe.teacher
        config, revision = source.config, source.revision
        teacher = Teacher(source.source, config=config, revision=revision, device=device, dtype=dtype)
        players[0].name = "student"
        players.insert(0, TorchPlayer("teacher", teacher))
    for player in players:
        check_size(player.opened, players[0].opened.native_size, "size")
        player.opened.check_weights()
    return players
