"""A recipe from plan to report, step by step; what is finished and valid is not done again.

A run folder::

    recipe.yaml  plan.json  steps.json   what was asked, what follows from it, which steps are done from which inputs
    student/                             the U-Net before distillation
    cache/ cache-2/ ...                  latents and prompt embeddings (unless the recipe puts them elsewhere); a second
                                         one where a stage's teacher encodes otherwise
    stage-1/ ...                         checkpoints/, log.jsonl, pairs.json, sheets/, and unet/ when the stage is done
    evaluation/                          evaluation.json, evaluation.md, sheet.png, pictures/
    pipeline/                            the student as a stock pipeline (and student.safetensors if asked)
    report.html
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from prunet import processes
from prunet.console import say
from prunet.data.cache import Cache, read_spec
from prunet.data.encoding import cache, cache_spec, pictures_are_gone
from prunet.data.sources import check_source
from prunet.denoisers.architecture import Net
from prunet.denoisers.pairs import Pair, term_factors
from prunet.disk.files import check_writable, read_json, read_label, write_json, write_text
from prunet.disk.ownership import check_place, hold
from prunet.disk.reading import parse_yaml
from prunet.disk.seals import file_checksum
from prunet.errors import UserError
from prunet.exports.card import origin
from prunet.exports.folder import export
from prunet.exports.single_file import export_single_file
from prunet.hashing import seed_of
from prunet.plan.derived import Derived, derive
from prunet.recipe.recipe import Recipe, TeacherSource, read_prompts
from prunet.runtime import Runtime
from prunet.sampling.draw import check_sampler
from prunet.student.folder import is_whole, load_unet, save_unet
from prunet.student.student import check_steps, cut, inherit, random_student
from prunet.teacher.configs import check_condition
from prunet.teacher.copying import check_other_parts
from prunet.teacher.space import check_same_space, check_size
from prunet.teacher.teacher import Teacher
from prunet.training.checkpoints import PACE, Saving, check_stage
from prunet.training.fit import micro_batch_of
from prunet.training.log import read_log
from prunet.training.loop import distil
from prunet.training.sheets import Sheets
from prunet.words import short

STEPS_FIX = "delete it and run again; stages resume from their checkpoints"
#: What to do about a damaged label of a stage.
LABEL_FIX = "delete it, if the checkpoints beside it are of this recipe, and give the same command again"
STEPS = ("plan", "build", "cache", "distil", "evaluate", "export", "report")


class Run:
    """A recipe on this machine: its teacher and plan, checked; its folder; the fingerprint of every step's inputs.

    `like`: another run on the same machine, with which this one shares the teachers that both have.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime | None = None, *, like: "Run | None" = None) -> None:
        self.recipe, self.runtime = recipe, runtime or Runtime()
        self.folder = Path(recipe.output)
        check_place(self.folder, "run", "output", read_paths(recipe))
        if recipe.cache:
            check_place(self.cache_folder, "cache", "cache", read_paths(recipe))
        sources = [recipe.teacher, *(stage.teacher or recipe.teacher for stage in recipe.stages)]
        self._opened: dict[str, Teacher] = like._opened if like else {}
        for source in sources:
            if (key := source.model_dump_json()) not in self._opened:
                self._opened[key] = self._open(source)
        #: The recipe's teacher, whose weights the student inherits; and the one of each stage.
        self.teacher, *self.teachers = (self._opened[source.model_dump_json()] for source in sources)
        self.derived: Derived = derive(self.teacher.unet_config, recipe.plan)
        self.steps_down = [derive(self.teacher.unet_config, plan) for plan in recipe.stage_plans]
        self.size = recipe.data.size or self.teacher.native_size
        self._check()

    def _open(self, source: TeacherSource) -> Teacher:
        return Teacher(
            source.source,
            config=source.config,
            revision=source.revision,
            device=self.runtime.torch_device,
            dtype=self.runtime.dtype,
        )

    def _check(self) -> None:
        """All that can be wrong is found here, before anything is loaded or computed."""
        recipe = self.recipe
        parse_yaml(recipe_yaml(recipe), "The recipe with all its values")  # the run folder's, which is read again
        if not recipe.plan.remove:
            say("[yellow]The plan removes nothing:[/] the student will be as large as the teacher")
        check_size(self.teacher, self.size)
        data = recipe.data
        if data.source is None:
            read_prompts(data.prompts or [], data.limit)
        elif not pictures_are_gone(data, self.cache_folder):
            check_source(data.source, image_column=data.image_column, caption_column=data.caption_column)
        read_prompts(recipe.evaluation.prompts, recipe.evaluation.limit)
        for teacher in dict.fromkeys([self.teacher, *self.teachers]):
            _ = teacher.noise_scheduler
            teacher.check_weights()
            check_same_space(self.teacher, teacher)
            encoders = [teacher.part_config(part) for part in teacher.text_encoders]
            check_condition(teacher.unet_config, encoders, teacher.source)
            if data.source is None:
                check_sampler(teacher, "dpmsolver++", data.steps, "data")
        if not self.is_done("export"):
            check_other_parts(self.teachers[-1])
        check_sampler(self.teachers[-1], recipe.evaluation.sampler, recipe.evaluation.steps, "evaluation")
        check_steps(self.steps_down)
        for number, stage in enumerate(recipe.stages, 1):
            self.micro_batch(number)
            term_factors(self.pairs(number), stage.losses.weights)
        self._check_folder()
        for number, stage in enumerate(recipe.stages, 1):
            if not self.is_done(f"stage-{number}"):  # refused here, before what is done is begun again
                check_stage(self.folder / f"stage-{number}", stage)
        if not self.are_done(self.step_names()):  # a finished run may lie where nothing can be written
            self._check_disk()
        for number, stage in enumerate(recipe.stages, 1):
            if stage.warmup_steps >= stage.steps:
                say(
                    f"[yellow]Stage {number} never reaches its learning_rate:[/] warmup_steps {stage.warmup_steps} of "
                    f"{stage.steps} steps"
                )

    def _check_disk(self) -> None:
        where = check_writable(self.folder, "output")
        for folder, _ in self.cache_specs:
            check_writable(folder, "cache")
        need = self._checkpoint_bytes()
        if shutil.disk_usage(where).free < need:
            raise UserError(
                f"output: checkpoints in {self.folder} need about {need / 1e9:.1f} GB free; lower keep_checkpoints, or "
                "give an output on another disk"
            )

    def _checkpoint_bytes(self) -> int:
        """What the checkpoints of the stages to come will take: those kept, and one more while it is being written."""
        need, largest = 0, 0
        for number, (stage, derived) in enumerate(zip(self.recipe.stages, self.steps_down, strict=True), 1):
            if self.is_done(f"stage-{number}"):
                continue
            size = 16 * derived.student_size.parameters  # weights, their average and two moments, in fp32
            need += size * min(self.recipe.keep_checkpoints, -(-stage.steps // self.recipe.checkpoint_every))
            need -= sum(f.stat().st_size for f in self.folder.glob(f"stage-{number}/checkpoints/*/*"))
            largest = max(largest, size)
        return max(0, need) + largest

    def _check_folder(self) -> None:
        """Refuses a folder with the cache or the checkpoints of another run, before anything in it is replaced."""
        for folder, spec in self.cache_specs:
            check_place(folder, "cache", "cache", read_paths(self.recipe))
            if (folder / "spec.json").is_file() and read_spec(folder) != spec:
                raise UserError(
                    f"{folder}: holds a cache of another teacher or other data: delete it, or give another with "
                    "'cache:'"
                )
        for number in range(1, len(self.recipe.stages) + 1):
            folder = self.folder / f"stage-{number}"
            label = folder / "inputs.json"
            begun = (folder / "checkpoints").is_dir() and label.is_file()
            if begun and read_label(label, ("inputs",), LABEL_FIX) != self._stage_label(number):
                raise UserError(
                    f"{folder}: holds checkpoints of another teacher, plan, data, seed or stage settings: give another "
                    "output, or delete that folder"
                )

    @property
    def latent_size(self) -> tuple[int, int]:
        side = self.size // self.teacher.vae_scale
        return side, side

    def micro_batch(self, number: int) -> int:
        """Samples at once on each device in stage `number`."""
        configs = (self.derived.teacher_config, self.steps_down[number - 1].student_config)
        stage = self.recipe.stages[number - 1]
        return micro_batch_of(stage, self.runtime, *configs, self.latent_size, processes.count())

    def pairs(self, number: int) -> tuple[Pair, ...]:
        """What stage `number` compares."""
        return self.steps_down[number - 1].pairs(self.recipe.stages[number - 1].losses.level)

    # -- fingerprints: each step's inputs, chained

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Step -> hash of all that its result depends on."""
        recipe = self.recipe
        begins = [] if recipe.initialisation == "inherited" else [recipe.initialisation, recipe.seed]
        build = _hash(self.teacher.fingerprint(["unet"]), recipe.plan.fingerprint, *begins)
        cached = _hash([spec for _, spec in self.cache_specs])
        out = {
            "plan": _hash(self.teacher.unet_config, recipe.plan.fingerprint),
            "build": build,
            "cache": cached,
        }
        # How the teacher is trained on and called: prediction type, noise schedule, its U-Net's config.
        last = _hash(build, self.teacher.unet_config, dict(self.teacher.noise_scheduler.config))
        for number, stage in enumerate(recipe.stages, 1):
            settings = (
                stage.model_dump(mode="json", exclude={"teacher"}),
                self.teachers[number - 1].fingerprint(["unet"]),
            )
            last = out[f"stage-{number}"] = _hash(last, self.cache_specs[number - 1][1], settings, recipe.seed)
        prompts = read_prompts(recipe.evaluation.prompts, recipe.evaluation.limit)
        evaluation = recipe.evaluation.model_dump(mode="json", exclude={"prompts", "limit", "seed"})
        out["evaluate"] = _hash(last, prompts, evaluation, recipe.evaluation.seed, self.size)
        out["export"] = _hash(out["evaluate"], recipe.export.model_dump(mode="json"), self.teachers[-1].fingerprint())
        out["report"] = _hash(out["export"])
        return out

    @cached_property
    def cache_specs(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and spec of the cache of each stage; teachers that encode alike share one."""
        found: list[tuple[Path, dict[str, Any]]] = []
        for number, teacher in enumerate(self.teachers, 1):
            spec = cache_spec(teacher, self.recipe.data, self.recipe.seed, self.cache_folder)
            own = Path(f"{self.cache_folder}-{number}") if found else self.cache_folder
            found.append(next((other for other in found if other[1] == spec), (own, spec)))
        return found

    def is_done(self, step: str) -> bool:
        """Whether `step` was finished from these inputs and its result is still there."""
        done = self._done().get(step)
        if done is None:  # before the inputs, which are hashes of large files
            return False
        if done.get("inputs") != self.inputs[step]:
            return False
        if step == "cache":
            return all((folder / "cache.json").is_file() for folder, _ in self.cache_specs)
        if step == "plan":  # derived in no time, so another one's is noticed and written again
            path = self.result_of(step)
            found = read_label(path, ("plan", "removed")) if path.is_file() else {}
            return found.get("removed") == sorted(self.derived.removed)
        if step == "export" and self.recipe.export.single_file and not is_whole(self.folder / "student.safetensors"):
            return False
        return is_whole(self.result_of(step))

    def are_done(self, steps: list[str]) -> bool:
        return all(map(self.is_done, steps))

    def result_of(self, step: str) -> Path:
        """The file that is there when the step is done."""
        weights = "diffusion_pytorch_model.safetensors"
        if step.startswith("stage-"):
            return self.folder / step / "unet" / weights
        return {
            "plan": self.folder / "plan.json",
            "build": self.folder / "student" / weights,
            "cache": self.cache_folder / "cache.json",
            "evaluate": self.folder / "evaluation" / "evaluation.json",
            "export": self.folder / "pipeline" / "unet" / weights,
            "report": self.folder / "report.html",
        }[step]

    @property
    def cache_folder(self) -> Path:
        return Path(self.recipe.cache) if self.recipe.cache else self.folder / "cache"

    def step_names(self, until: str = "report") -> list[str]:
        """The steps in order, `distil` being one for each stage, up to and with `until`."""
        stages = [f"stage-{number}" for number in range(1, len(self.recipe.stages) + 1)]
        names = [n for step in STEPS[: STEPS.index(until) + 1] for n in (stages if step == "distil" else [step])]
        return names

    # -- the steps

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While no other command may write into the run folder; the processes of one launch share it.

        Raises:
            UserError: another one works there, and which.
        """
        processes.join(self.runtime.torch_device)
        with hold(self.folder, "run") if processes.is_main() else nullcontext():
            yield

    def finish(self, until: str = "report") -> None:
        """Does what is not done of the steps up to and with `until`."""
        processes.join(self.runtime.torch_device)
        names = self.step_names(until)
        done = processes.from_main(lambda: self.are_done(names))
        with nullcontext() if done else self.at_work():
            for step in names:
                self.do(step)

    def do(self, step: str) -> None:
        """Does one step, unless it is done, and says which. All processes come here, and leave when it is done."""
        processes.join(self.runtime.torch_device)
        if processes.from_main(lambda: self.is_done(step)):
            say(f"[green]✓[/] {step} [dim]is done[/]")
            return
        with self.at_work():
            self._do(step)

    def _do(self, step: str) -> None:
        say(f"[bold]→ {step}[/]")
        start = time.perf_counter()
        processes.from_main(lambda: self._begin(step))
        shared = {"cache": self._cache, "evaluate": self._evaluate}
        alone = {"plan": self._plan, "build": self._build, "export": self._export, "report": self._report}
        if step.startswith("stage-"):
            self._stage(int(step.removeprefix("stage-")))
        elif step in shared:
            shared[step]()
        else:
            processes.from_main(alone[step])
        seconds = round(max(time.perf_counter() - start, self._logged_seconds(step)), 1)
        processes.from_main(lambda: self._finish(step, seconds))
        say(f"[green]✓[/] {step} [dim]in {seconds:.0f} s[/]")

    def _begin(self, step: str) -> None:
        """A step that begins again is not done, nor is what comes after it, however far it gets this time."""
        names, done = self.step_names(), self._done()
        kept = {n: value for n, value in done.items() if n in names[: names.index(step)]}
        if kept != done:
            write_json(self.folder / "steps.json", kept)
        write_text(self.folder / "recipe.yaml", recipe_yaml(self.recipe))  # settings may have changed since the plan

    def _logged_seconds(self, step: str) -> float:
        """What all steps of a stage took, those before it was stopped included."""
        log = self.folder / step / "log.jsonl"
        if not log.is_file():
            return 0.0
        batch_size = self.recipe.stages[int(step.removeprefix("stage-")) - 1].batch_size
        rows = read_log(log)
        before = [0, *(row["step"] for row in rows)]
        return sum(
            (row["step"] - b) * batch_size / max(row["images_per_s"], 1e-4)  # as many digits as the log has
            for row, b in zip(rows, before, strict=False)
        )

    def _finish(self, step: str, seconds: float) -> None:
        log = self.folder / step / "log.jsonl"
        logged = {"log": file_checksum(log)} if log.is_file() else {}
        done = {**self._done(), step: {"inputs": self.inputs[step], "seconds": seconds} | logged}
        write_json(self.folder / "steps.json", done)

    def _done(self) -> dict[str, Any]:
        path = self.folder / "steps.json"
        done = read_json(path, STEPS_FIX) if path.is_file() else {}
        if not (isinstance(done, dict) and all(isinstance(step, dict) for step in done.values())):
            raise UserError(f"{path}: damaged: {STEPS_FIX}")
        return done

    def _plan(self) -> None:
        write_json(self.folder / "plan.json", self.derived.facts())

    def _build(self) -> None:
        save_unet(self._initial(self.derived), self.folder / "student", "build", self.inputs["build"])

    def _initial(self, derived: Derived) -> Net:
        if self.recipe.initialisation == "random":
            return random_student(derived, self.recipe.seed)
        return inherit(self._stored_teacher().unet, derived)

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

    def _stage(self, number: int) -> None:
        recipe, stage, teacher = self.recipe, self.recipe.stages[number - 1], self.teachers[number - 1]
        folder = self.folder / f"stage-{number}"
        for other in {*self.teachers, self.teacher} - {teacher}:
            other.release("unet", "vae", "text")
        pairs = self.pairs(number)
        if processes.is_main():
            write_json(folder / "inputs.json", self._stage_label(number))
            write_json(folder / "pairs.json", {"pairs": [dataclasses.asdict(pair) for pair in pairs]})
        prompts = recipe.sheet.prompts or read_prompts(recipe.evaluation.prompts)[:6]
        if not recipe.sheet.every:
            teacher.release("vae", "text")  # nothing else in the loop needs them
        trained = distil(
            teacher,
            self._student_at_start(number),
            pairs,
            Cache.open(self.cache_specs[number - 1][0]),
            stage,
            folder,
            seed=seed_of(recipe.seed, "stage", number),  # so that no stage repeats another one's noise
            runtime=self.runtime,
            sheets=Sheets(
                teacher,
                folder / "sheets",
                prompts,
                recipe.sheet.every,
                recipe.seed,
                self.size,
                steps=recipe.evaluation.steps,
                guidance_scale=recipe.evaluation.guidance_scale,
            ),
            saving=Saving(recipe.checkpoint_every, recipe.keep_checkpoints),
        )
        if processes.is_main():
            save_unet(trained, folder / "unet", "stage", self.inputs[f"stage-{number}"])
        if self.runtime.teacher_8bit or self.runtime.teacher_fp8:
            teacher.release("unet")  # what is measured and exported is the teacher as it is stored

    def _student_at_start(self, number: int) -> Net:
        """What stage `number` trains: the student of the stage before it, cut further if the plan goes on."""
        after = self.steps_down[number - 1]
        if number == 1:
            whole = after.removed.keys() == self.derived.removed.keys()
            return self._unet_of("build") if whole else self._initial(after)
        before, trained = self.steps_down[number - 2], self._unet_of(f"stage-{number - 1}")
        return trained if before.removed.keys() == after.removed.keys() else cut(trained, before, after)

    def _stored_teacher(self, other: TeacherSource | None = None) -> Teacher:
        """In fp32 on the CPU, whatever the run's precision: students start from the weights as they are stored."""
        source = other or self.recipe.teacher
        return Teacher(source.source, config=source.config, revision=source.revision)

    def _stage_label(self, number: int) -> dict[str, str]:
        """What the checkpoints of a stage come from: student, cache, seed, and all of its settings but the pace."""
        settings = self.recipe.stages[number - 1].model_dump(mode="json", exclude={*PACE, "teacher"})
        before = self.inputs["build" if number == 1 else f"stage-{number - 1}"]
        made_by = self.cache_specs[number - 1][1], self.teachers[number - 1].fingerprint(["unet"])
        return {"inputs": _hash(before, made_by, settings, self.recipe.seed)}

    def _unet_of(self, step: str) -> Net:
        """What `build` or a stage left, if it still is that."""
        return load_unet(self.result_of(step).parent, self.inputs[step])

    def last_unet(self) -> Net:
        """The distilled U-Net."""
        return self._unet_of(f"stage-{len(self.recipe.stages)}")

    def _evaluate(self) -> None:
        from prunet.evaluation.evaluation import evaluate

        evaluate(
            self.teachers[-1],
            {"before": self._unet_of("build"), "after": self.last_unet()},
            self.recipe.evaluation,
            self.folder / "evaluation",
            size=self.size,
            seed=self.recipe.evaluation.seed,
            protocol={
                "teacher": self.teachers[-1].fingerprint(),
                "student": self.inputs[f"stage-{len(self.recipe.stages)}"],
            },
        )

    def _export(self) -> None:
        options = self.recipe.export
        export(
            self.exported_teacher(),
            self.last_unet(),
            self.folder / "pipeline",
            card=self.card(),
            fp16=options.fp16,
            what="export",
        )
        if options.single_file:
            export_single_file(self.folder / "pipeline", self.folder / "student.safetensors", fp16=options.fp16)

    def exported_teacher(self) -> Teacher:
        """The last stage's, as it is stored: the student's pipeline has its other parts."""
        return self._stored_teacher(self.recipe.stages[-1].teacher)

    def card(self) -> dict[str, Any]:
        """What the model card tells."""
        from prunet.evaluation.results import read_evaluation

        result = read_evaluation(self.folder / "evaluation", self._done())
        prompts = result["protocol"]["prompts"]
        measures = {name: result["distance"][name] for name in ("before", "after")}
        has_cache = (self.cache_folder / "cache.json").is_file()  # it may be deleted when all is done
        source = self.recipe.data.source or []
        pictures = ", ".join(map(short, [source] if isinstance(source, str) else source))
        return {
            **origin(self.teacher),
            "data": pictures or "latents that the teacher drew from prompts",
            "license": self.recipe.export.license,
            "plan": {"name": self.recipe.plan.name, "remove": list(self.recipe.plan.remove)},
            "recipe": self.recipe.model_dump(mode="json"),
            "samples": f"{len(Cache.open(self.cache_folder)):,}" if has_cache else None,
            "size": self.size,
            "sizes": result["sizes"],
            "loads_in": self.derived.loads_in,
            "works_with": self.derived.works_with,
            "measures": {"prompts": len(prompts), **measures},
            "prompt": prompts[0],
        }

    def _report(self) -> None:
        from prunet.report.run import write_report

        write_report(self.folder)


def run(recipe: Recipe, runtime: Runtime | None = None, *, until: str = "report") -> Path:
    """Does the recipe up to and with step `until`, skipping what is finished and valid; returns the run folder.

    Given again after a stop, it resumes where it was.

    Raises:
        UserError: anything in the recipe that does not fit, before the first step begins.
    """
    this = Run(recipe, runtime)
    this.finish(until)
    return this.folder


def read_paths(recipe: Recipe) -> list[Path]:
    """Where a recipe's teachers and data lie on this machine, if they do: nothing may be written there."""
    teachers = [recipe.teacher, *(stage.teacher for stage in recipe.stages if stage.teacher)]
    data = recipe.data.source or []
    sources = [*(s for t in teachers for s in (t.source, t.config) if s), *([data] if isinstance(data, str) else data)]
    return [path for path in (Path(source).expanduser() for source in sources) if path.exists()]


def recipe_yaml(recipe: Recipe) -> str:
    value = recipe.model_dump(mode="json")
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
