"""Personalises a model. In: pictures of a subject. Out: a LoRA or a pipeline that draws it.

The folder of a personalisation::

    personalization.json            what it was made from
    class/000000.png ...            pictures of the class, drawn by the model itself
    cache/ class-cache/             latents and prompt embeddings of both
    training/                       checkpoints/, log.jsonl, sheets/
    lora/                           pytorch_lora_weights.safetensors and its card; or
    pipeline/                       the personalised model as a stock pipeline

A stopped personalisation resumes, and a finished one is not repeated.
"""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape

from prunet.adapters.adapt import LORA_FILE
from prunet.adapters.lora_file import PERSONALIZED, check_lora, write_lora
from prunet.console import say
from prunet.data.contents import source_fingerprint
from prunet.data.subject import cache_subject, subject_pictures
from prunet.denoisers.architecture import Net
from prunet.disk.files import check_writable, new_folder, read_label, write_json
from prunet.disk.ownership import check_place, hold
from prunet.disk.seals import read_seal, verify
from prunet.errors import UserError
from prunet.exports.card import model_card, origin
from prunet.exports.folder import export
from prunet.hashing import json_hash, seed_of
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.recipe.personalization import Personalization
from prunet.recipe.values import Drawing
from prunet.runs.estimate import seconds_per_image
from prunet.runs.fingerprints import SCHEDULE
from prunet.runtime import Runtime
from prunet.sampling.draw import Model, collect, draw, is_drawn, open_model
from prunet.sampling.made_for import drawing_of, made_for
from prunet.sampling.paths import schedule_of
from prunet.student.student import inherit
from prunet.teacher.configs import check_condition
from prunet.teacher.copying import check_other_parts
from prunet.teacher.space import check_size
from prunet.teacher.teacher import PARTS, Teacher
from prunet.training.checkpoints import PACE, Saving, check_stage
from prunet.training.fit import micro_batch_of, training_memory
from prunet.training.loop import train
from prunet.training.lora import check_rank, lora_layers, trainable, trained_count
from prunet.training.memory import step_memory
from prunet.training.objectives.personalization import Personalization as Objective
from prunet.training.samples import Samples, SubjectSamples
from prunet.training.sheets import Sheets
from prunet.words import difference, many, short

CARD = "personalized.md.j2"
#: Number of pictures of the subject on a sheet, and of its class, if there is one.
SHEET = 4, 2


class Personal:
    """A personalisation on this machine. Opening it reads the model's configs and the pictures.

    Raises:
        UserError: there is no model or no picture, or the model cannot draw the size.
    """

    def __init__(self, spec: Personalization, runtime: Runtime | None = None) -> None:
        self.spec, self.runtime, self.folder = spec, runtime or Runtime(), Path(spec.output)
        check_place(self.folder, "personalization", "--output", [Path(spec.model), Path(spec.pictures)])
        self.model = open_model(Model(spec.model, spec.config, self.runtime.torch_device, self.runtime.dtype))
        self.derived = derive(self.model.unet_config, Plan("none"))
        self.size = spec.size or self.model.native_size
        check_size(self.model, self.size, "--size")
        self.pictures = len(subject_pictures(Path(spec.pictures), spec.prompt))
        if spec.lora:
            check_rank(self.model.unet_config, spec.lora, "--lora")
        side = self.size // self.model.vae_scale
        self.latent_size = side, side
        configs = self.derived.teacher_config, self.derived.student_config
        self.micro_batch = micro_batch_of(spec, self.runtime, *configs, self.latent_size)

    def check(self) -> None:
        """Refuses anything that would stop it later, before anything is drawn or trained.

        Raises:
            UserError: the model's files are damaged, or the folder has another personalisation.
        """
        self.model.check_weights()
        encoders = [self.model.part_config(part) for part in self.model.text_encoders]
        check_condition(self.model.unet_config, encoders, self.model.source)
        self.model.check_prompts([prompt for prompt in (self.spec.prompt, self.spec.class_prompt) if prompt])
        if self.spec.lora is None:
            check_other_parts(self.model)
        _ = self._drawing
        self._check_disk()
        if (label := self.folder / "personalization.json").is_file():
            before = read_label(label, ("inputs",))["inputs"]
            if what := difference({SCHEDULE: self._inputs[SCHEDULE]} | before, self._inputs):
                raise UserError(
                    f"{self.folder}: holds a personalisation with {what}: give another --output, or delete it"
                )
        check_stage(self.folder / "training", self.spec)
        if own := made_for(self.model):
            say(f"[yellow]{escape(self.model.source)} was made for {own},[/] which this training does not teach")

    def _check_disk(self) -> None:
        config, where = self.derived.student_config, check_writable(self.folder, "--output")
        # A checkpoint has the trained weights and two moments; two are kept while a third is written.
        need = 3 * 12 * trained_count(config, self.spec.rank) + (
            0 if self.spec.lora else 4 * trained_count(config, None)
        )
        if shutil.disk_usage(where).free < need:
            raise UserError(f"--output {self.folder}: checkpoints need about {many(need)}B free: give another disk")

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        """Everything that the result depends on, except the pace of training."""
        return {
            "model": f"{short(self.spec.model)} ({self.model.fingerprint()})",
            SCHEDULE: schedule_of(self.model),
            "pictures": f"{short(self.spec.pictures)} ({source_fingerprint(self.spec.pictures)})",
            **self.spec.settings(*PACE),
            "size": self.size,
        }

    @property
    def result(self) -> Path:
        """The folder of the result."""
        return self.folder / ("pipeline" if self.spec.lora is None else "lora")

    def finish(self) -> Path:
        """Does all steps that are left, and returns the folder of the result.

        Raises:
            UserError: another command works in the folder, or the result was changed.
        """
        decided = {key: value for key, value in self._inputs.items() if key != SCHEDULE}  # `check` compares that
        made_from = json_hash([decided, self.spec.settings()])
        if (read_seal(self.result) or {}).get("made_from") == made_from:
            verify(self.result, f"delete {self.result}, and it is written again from the last checkpoint")
            return self.result
        check_place(self.result, "personalized", "--output")
        with hold(self.folder, "personalization"):
            write_json(self.folder / "personalization.json", {"inputs": self._inputs})
            net = self._train(self._samples())
            self._write(net, made_from)
        return self.result

    @property
    def _drawing(self) -> Drawing:
        return drawing_of(self.model, Drawing(), Drawing.given(guidance_scale=self.spec.guidance_scale))

    def _samples(self) -> Samples:
        """Draws the class, and encodes it and the subject."""
        how, seed = {"size": self.size, "seed": self.spec.seed}, self.spec.seed
        subject = cache_subject(self.model, Path(self.spec.pictures), self.spec.prompt, self.folder / "cache", **how)
        if self.spec.class_prompt is None:
            return Samples(subject, self.spec, seed, self.model.process)
        self._draw_class(self.spec.class_prompt)
        place = self.folder / "class-cache"
        classes = cache_subject(self.model, self.folder / "class", self.spec.class_prompt, place, **how)
        return SubjectSamples(subject, classes, self.spec, seed, self.model.process)

    def _draw_class(self, prompt: str) -> None:
        """Draws the missing pictures of the class."""
        paths = {number: self.folder / "class" / f"{number:06d}.png" for number in range(self.spec.class_pictures)}
        todo = {number: path for number, path in paths.items() if not is_drawn(path, prompt)}
        if not todo:
            return
        prompts = [prompt] * len(todo)
        seeds = [seed_of(self.spec.seed, "class", number) for number in todo]
        pictures = draw(self.model.pipeline(), prompts, seeds, self._drawing, size=self.size)
        collect(pictures, prompts, "Drawing the class", list(todo.values()))

    def _train(self, samples: Samples) -> Net:
        spec = self.spec
        subject, others = SHEET
        prompts = (
            [spec.prompt] * subject + [spec.class_prompt] * others if spec.class_prompt else [spec.prompt] * subject
        )
        sheets = Sheets(
            self.model,
            self.folder / "training" / "sheets",
            prompts,
            spec.sheet_every,
            spec.seed,
            self.size,
            self._drawing,
            labels=("before", "after"),
            idle=PARTS,
        )
        self.model.release(*PARTS)
        return train(
            Objective(self.model, spec.prior_weight if spec.class_prompt else None),
            trainable(inherit(self._stored().unet, self.derived), spec.lora, spec.seed),
            samples,
            self.micro_batch,
            self.folder / "training",
            runtime=self.runtime,
            sheets=sheets,
            saving=Saving(spec.checkpoint_every),
        )

    def _stored(self) -> Teacher:
        """Opens the model in fp32 on the CPU for any precision, because training starts from the stored weights."""
        return open_model(Model(self.spec.model, self.spec.config))

    def _write(self, net: Net, made_from: str) -> None:
        facts = {**origin(self.model), **self.spec.model_dump(), "rank": self.spec.lora, "template": CARD}
        card = facts | {"size": self.size, "pictures": self.pictures, "made_for": made_for(self.model)}
        stored = self._stored()
        if self.spec.lora is None:
            export(stored, net, self.result, card=card, what="personalized", made_from=made_from)
            return
        with new_folder(self.result, "personalized", made_from) as part:
            about = {PERSONALIZED: json.dumps({"model": short(self.spec.model), "prompt": self.spec.prompt})}
            write_lora(lora_layers(net), part / LORA_FILE, self.derived.architecture.part, about)
            (part / "README.md").write_text(model_card(card), encoding="utf-8")
            check_lora(stored.pipeline(vae=None), net, part / LORA_FILE)

    def estimate(self) -> dict[str, Any]:
        """Estimates the peak memory by part, and the hours, of the training on this device; nothing is written."""
        spec, runtime, config = self.spec, self.runtime, self.derived.student_config
        at_once = self.micro_batch * spec.rows
        parts = training_memory(config, config, self.latent_size, self.micro_batch, spec, runtime)
        activations = step_memory(
            config,
            config,
            (),
            latent_size=self.latent_size,
            micro_batch=at_once,
            accumulate=spec.batch_size // self.micro_batch,
            runtime=runtime,
            rank=spec.rank,
        )
        parts = {**parts, "activations": activations}
        each_s = seconds_per_image(self.derived, (), self.latent_size, at_once, runtime, 0, spec.rank)
        return {
            "steps": spec.steps,
            "memory_bytes": {**parts, "total": sum(parts.values())},
            "micro_batch": self.micro_batch,
            "class_pictures": spec.class_pictures if spec.class_prompt else 0,
            "hours": each_s * spec.rows * spec.steps * spec.batch_size / 3600,
        }


def personalize(spec: Personalization, runtime: Runtime | None = None) -> Path:
    """Personalises a model; returns the folder of its LoRA or pipeline. The same call resumes after a stop.

    Raises:
        UserError: something does not fit, before anything is drawn or trained.
    """
    this = Personal(spec, runtime)
    this.check()
    return this.finish()
