"""Runs a recipe from plan to report, step by step; finished steps are skipped.

A run folder::

    recipe.yaml  plan.json  steps.json   the recipe, the derived plan, and the finished steps with their inputs
    student/                             the U-Net before distillation
    cache/ cache-2/ ...                  latents and prompt embeddings (unless the recipe puts them elsewhere); more
                                         than one if the stages' teachers encode differently
    cache-paths/ ...                     the teacher's paths, if a stage learns from them
    stage-1/ ...                         checkpoints/, log.jsonl, pairs.json, sheets/; when done unet/, and its LoRA
    evaluation/                          evaluation.json, evaluation.md, sheet.png, pictures/, image-to-image/
    pipeline/                            the student as a stock pipeline (and student.safetensors if asked)
    report.html
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from prunet import processes
from prunet.adapters.adapt import LORA_FILE
from prunet.adapters.lora_file import write_lora
from prunet.console import say
from prunet.data.cache import Cache
from prunet.data.encoding import cache
from prunet.data.paths import cache_paths
from prunet.denoisers.architecture import Net
from prunet.denoisers.pairs import Pair, StagePairs
from prunet.disk.files import write_json
from prunet.disk.ownership import hold
from prunet.evaluation.evaluation import evaluate
from prunet.exports.folder import export
from prunet.exports.single_file import export_single_file
from prunet.hashing import seed_of
from prunet.plan.derived import Derived
from prunet.recipe.recipe import Recipe, read_prompts
from prunet.recipe.stage import TeacherSource
from prunet.report.run import write_report
from prunet.runs import fingerprints, steps
from prunet.runs.card import card_facts
from prunet.runs.checks import check_run
from prunet.runtime import Runtime
from prunet.student.folder import load_unet, save_unet
from prunet.student.student import cut, derive_stages, inherit, random_student
from prunet.teacher.teacher import PARTS, Teacher
from prunet.training.checkpoints import Saving
from prunet.training.fit import micro_batch_of
from prunet.training.least_squares import fit
from prunet.training.loop import distil
from prunet.training.lora import lora_layers, merge_lora
from prunet.training.sheets import Sheets


class Run:
    """A recipe on this machine: its opened teachers, its derived plan, its folder and finished steps.

    Opening a run checks only that its teachers exist and its plan fits; `check` checks the rest.

    `like`: another run on this machine; the two runs share equal teachers.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime | None = None, *, like: "Run | None" = None) -> None:
        self.recipe, self.runtime = recipe, runtime or Runtime()
        self.folder = Path(recipe.output)
        sources = [recipe.teacher, *(stage.teacher or recipe.teacher for stage in recipe.stages)]
        self._opened: dict[str, Teacher] = like._opened if like else {}
        for source in sources:
            if (key := source.model_dump_json()) not in self._opened:
                self._opened[key] = self._open(source)
        #: The recipe's teacher, from which the student inherits its weights, and the teacher of each stage.
        self.teacher, *self.teachers = (self._opened[source.model_dump_json()] for source in sources)
        self.derived, self.steps_down = derive_stages(self.teacher.unet_config, recipe)
        self.size = recipe.data.size or self.teacher.native_size

    def check(self, until: str = "report") -> None:
        """Checks everything that the steps up to `until` need, before anything is loaded or computed.

        Raises:
            UserError: the recipe, its models, data or folders do not fit.
        """
        check_run(self, until)

    def _open(self, source: TeacherSource) -> Teacher:
        return Teacher(
            source.source,
            config=source.config,
            revision=source.revision,
            device=self.runtime.torch_device,
            dtype=self.runtime.dtype,
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        side = self.size // self.teacher.vae_scale
        return side, side

    def micro_batch(self, number: int) -> int:
        """Returns how many samples each device takes at once in stage `number`."""
        configs = (self.derived.teacher_config, self.steps_down[number - 1].student_config)
        stage = self.recipe.stages[number - 1]
        return micro_batch_of(stage, self.runtime, *configs, self.latent_size, processes.count())

    def pairs(self, number: int) -> tuple[Pair, ...]:
        """Returns the pairs of features that stage `number` compares; none if its objective compares no features."""
        if not self.recipe.stages[number - 1].has("losses"):
            return ()
        return self.steps_down[number - 1].pairs(self.recipe.stages[number - 1].losses.level)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """For each step a hash of everything that its result depends on."""
        return fingerprints.step_inputs(self)

    @cached_property
    def cache_specs(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and spec of the cache of each stage."""
        return fingerprints.stage_caches(self)

    @cached_property
    def path_specs(self) -> dict[int, tuple[Path, dict[str, Any]]]:
        """Folder and spec of the cache of paths of each stage that has one, by the stage's number."""
        return fingerprints.stage_paths(self)

    def step_names(self, until: str = "report") -> list[str]:
        """Returns the steps in order up to and including `until`; `distil` stands for one step per stage."""
        return steps.step_names(len(self.recipe.stages), until)

    def result_of(self, step: str) -> Path:
        """Returns the file that exists when the step is done."""
        return steps.result_of(self, step)

    def is_done(self, step: str) -> bool:
        """Returns whether `step` was finished from these inputs and its result still exists."""
        return steps.is_done(self, step)

    def todo(self, until: str = "report") -> list[str]:
        """Returns the steps left up to and including `until`; results that none of them reads may be deleted."""
        return steps.todo(self, until)

    @property
    def cache_folder(self) -> Path:
        """The folder of the first stage's cache."""
        return Path(self.recipe.cache) if self.recipe.cache else self.folder / "cache"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keeps other commands from writing into the run folder; the processes of one launch share it.

        Raises:
            UserError: another command works in the folder; the message names it.
        """
        processes.join(self.runtime.torch_device)
        with hold(self.folder, "run") if processes.is_main() else nullcontext():
            yield

    def finish(self, until: str = "report") -> None:
        """Does the steps that are left up to and including `until`."""
        processes.join(self.runtime.torch_device)
        with self.at_work() if processes.from_main(lambda: self.todo(until)) else nullcontext():
            for step in self.step_names(until):
                todo = processes.from_main(lambda: self.todo(until))
                if step in todo or processes.from_main(partial(self.is_done, step)):
                    self.do(step)
                else:
                    remains = processes.from_main(partial(steps.remains, self, step))
                    say(f"[green]✓[/] {step} [dim]is not needed{remains}[/]")

    def do(self, step: str) -> None:
        """Does one step unless it is done, and prints its name. All processes call this, and return when it is done.

        Raises:
            UserError: its result was changed, or would replace a user's own files.
        """
        processes.join(self.runtime.torch_device)
        if processes.from_main(lambda: self.is_done(step)):
            processes.from_main(lambda: steps.verify_done(self, step))
            say(f"[green]✓[/] {step} [dim]is done[/]")
            return
        with self.at_work():
            self._do(step)

    def _do(self, step: str) -> None:
        say(f"[bold]→ {step}[/]")
        start = time.perf_counter()
        processes.from_main(lambda: steps.check_replaceable(self, step))
        processes.from_main(lambda: steps.begin(self, step))
        shared = {"cache": self._cache, "evaluate": self._evaluate}
        alone = {"plan": self._plan, "build": self._build, "export": self._export, "report": self._report}
        if step.startswith("stage-"):
            self._stage(int(step.removeprefix("stage-")))
        elif step in shared:
            shared[step]()
        else:
            processes.from_main(alone[step])
        seconds = round(max(time.perf_counter() - start, steps.logged_seconds(self, step)), 1)
        processes.from_main(lambda: steps.finish(self, step, seconds))
        say(f"[green]✓[/] {step} [dim]in {seconds:.0f} s[/]")

    def _plan(self) -> None:
        self.derived.result().save(self.folder / "plan.json")

    def _build(self) -> None:
        save_unet(self._initial(self.derived), self.folder / "student", "build", self.inputs["build"])

    def _initial(self, derived: Derived) -> Net:
        if self.recipe.initialisation == "random":
            return random_student(derived, self.recipe.seed)
        student = inherit(self._stored_teacher().unet, derived)
        if self.recipe.initialisation == "inherited":
            return student
        return fit(self.teachers[0], student, derived, Cache.open(self.cache_folder), self.recipe.seed)

    def _cache(self) -> None:
        made: Cache | None = None
        folders = [folder for folder, _ in self.cache_specs]
        for folder in dict.fromkeys(folders):
            teacher = self.teachers[folders.index(folder)]
            made = cache(teacher, self.recipe.data, folder, seed=self.recipe.seed, like=made)
            skipped = f", {len(made.skipped)} skipped" if made.skipped else ""
            say(f"  {len(made):,} samples at {self.size} px by {escape(teacher.source)}{skipped}")
            if teacher is not self.teachers[0]:
                teacher.release("vae", "text")
        for number, (folder, _) in self.path_specs.items():
            teacher, stage = self.teachers[number - 1], self.recipe.stages[number - 1]
            paths = cache_paths(teacher, Cache.open(self.cache_specs[number - 1][0]), stage, folder)
            say(f"  {len(paths):,} paths of {stage.path_steps} steps by {escape(teacher.source)}")

    def _stage(self, number: int) -> None:
        recipe, stage, teacher = self.recipe, self.recipe.stages[number - 1], self.teachers[number - 1]
        folder = self.folder / f"stage-{number}"
        for other in {*self.teachers, self.teacher} - {teacher}:
            other.release(*PARTS)
        pairs = self.pairs(number)
        if processes.is_main():
            write_json(folder / "inputs.json", fingerprints.stage_label(self, number))
            StagePairs(pairs=list(pairs)).save(folder / "pairs.json")
        prompts = recipe.sheet.prompts or read_prompts(recipe.evaluation.prompts)[:6]
        idle = ["vae"] + ["text"] * (recipe.data.text == "cached") + ["unet"] * (not stage.teacher_calls)
        teacher.release(*idle)
        sheets = Sheets(
            teacher,
            folder / "sheets",
            prompts,
            recipe.sheet.every,
            recipe.seed,
            self.size,
            recipe.evaluation,
            stage.made_for(recipe.evaluation),
            idle=idle,
        )
        try:
            trained = distil(
                teacher,
                self._student_at_start(number),
                pairs,
                Cache.open((self.path_specs.get(number) or self.cache_specs[number - 1])[0]),
                stage,
                folder,
                seed=seed_of(recipe.seed, "stage", number),  # so that no stage repeats the noise of another
                runtime=self.runtime,
                sheets=sheets,
                saving=Saving(recipe.checkpoint_every, recipe.keep_checkpoints),
            )
        except KeyboardInterrupt:
            say(f"  {steps.resumes_from(self, number)}")
            raise
        if processes.is_main():
            if stage.lora:
                write_lora(lora_layers(trained), folder / LORA_FILE, self.derived.architecture.part, {})
                merge_lora(trained)
            save_unet(trained, folder / "unet", "stage", self.inputs[f"stage-{number}"])
        if self.runtime.teacher_8bit or self.runtime.teacher_fp8:
            teacher.release("unet")  # evaluation and export use the teacher as it is stored

    def _student_at_start(self, number: int) -> Net:
        """Returns the student that stage `number` trains: that of the stage before, cut further if the plan says so."""
        after = self.steps_down[number - 1]
        if number == 1:
            return self._unet_of("build") if after.form == self.derived.form else self._initial(after)
        before, trained = self.steps_down[number - 2], self._unet_of(f"stage-{number - 1}")
        return trained if before.form == after.form else cut(trained, before, after)

    def _stored_teacher(self, other: TeacherSource | None = None) -> Teacher:
        """Opens a teacher in fp32 on the CPU for any precision, because students start from the stored weights."""
        source = other or self.recipe.teacher
        return Teacher(source.source, config=source.config, revision=source.revision)

    def _unet_of(self, step: str) -> Net:
        """Loads the U-Net that `build` or a stage wrote, and checks that it was made from these inputs."""
        return load_unet(steps.folder_of(self, step), self.inputs[step])

    def last_unet(self) -> Net:
        """Loads the distilled U-Net."""
        return self._unet_of(f"stage-{len(self.recipe.stages)}")

    def _evaluate(self) -> None:
        last = f"stage-{len(self.recipe.stages)}"
        evaluate(
            self.teachers[-1],
            {"before": self._unet_of("build"), "after": self.last_unet()},
            self.recipe.evaluation,
            self.folder / "evaluation",
            size=self.size,
            seed=self.recipe.evaluation.seed,
            drawing=self.recipe.made_for,
            protocol={"teacher": self.teachers[-1].fingerprint(), "student": self.inputs[last]},
        )

    def _export(self) -> None:
        options = self.recipe.export
        export(
            self.exported_teacher(),
            self.last_unet(),
            self.folder / "pipeline",
            card=card_facts(self),
            fp16=options.fp16,
            drawing=self.recipe.made_for,
            what="export",
        )
        if options.single_file:
            export_single_file(self.folder / "pipeline", self.folder / "student.safetensors", fp16=options.fp16)

    def exported_teacher(self) -> Teacher:
        """Opens the last stage's teacher as it is stored, because the student's pipeline gets its other parts."""
        return self._stored_teacher(self.recipe.stages[-1].teacher)

    def _report(self) -> None:
        write_report(self.folder)


def run(recipe: Recipe, runtime: Runtime | None = None, *, until: str = "report") -> Path:
    """Runs the recipe up to and including step `until`; returns the run folder.

    Finished steps are skipped, so the same call resumes a run that was stopped.

    Raises:
        UserError: something in the recipe does not fit; this is found before the first step begins.
    """
    this = Run(recipe, runtime)
    this.check(until)
    this.finish(until)
    return this.folder
