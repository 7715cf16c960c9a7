"""The command line. Each verb is one public function; `--json` makes the last line of stdout one JSON object."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunet import __version__
from prunet.errors import UserError

# Where typer keeps its click differs between versions; its own BadParameter knows.
UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="prunet",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make a Stable Diffusion model smaller and faster: remove blocks of its U-Net, distil what is left.\n\n"
    "Start with [bold]prunet inspect sd-v1 --plan bk-small[/], then [bold]prunet run RECIPE[/].",
)

Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object on the last line of stdout.")]
PlanOption = Annotated[str, typer.Option("--plan", "-p", help="A preset's name or a YAML file with patterns.")]
TeacherArgument = Annotated[
    str, typer.Argument(help="diffusers folder, .safetensors file, hub id, or layout (sd-v1, sd-v2, sdxl).")
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", help="For a single file: folder or hub id with configs and tokenizers."),
]
RecipeArgument = Annotated[Path, typer.Argument(help="A YAML recipe, or a run folder (its recipe.yaml).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value of the recipe: stages.0.steps=100.")
]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, mps; the best there is by default.")]
PrecisionOption = Annotated[str, typer.Option(help="no, bf16, fp16, or auto: bf16 where the hardware has it.")]
Micro = Annotated[
    int | None,
    typer.Option("--micro-batch", min=1, help="Samples at once on a device; what fits by default."),
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice to need less memory.")
]
OffloadEma = Annotated[bool, typer.Option("--offload-ema", help="Keep the average of the weights on the CPU.")]
Adam8Bit = Annotated[bool, typer.Option("--use-8bit-adam", help="The optimizer's state in 8 bits (GPU, bitsandbytes).")]
Teacher8Bit = Annotated[bool, typer.Option("--teacher-8bit", help="The teacher's linear layers in 8 bits (torchao).")]
Fsdp = Annotated[
    bool, typer.Option("--fsdp", help="Share the student out among the processes (FSDP2), instead of a copy in each.")
]
Tracker = Annotated[str | None, typer.Option(help="Also log to an accelerate tracker, such as tensorboard.")]


#: What several processes may do together.
SHARED = ("run", "cache", "distil", "evaluate", "measure")


def _say(as_json: bool, facts: dict[str, Any], text: Any = None) -> None:
    from prunet.processes import is_main

    if not is_main():
        return
    if as_json:
        print(json.dumps(facts))
    elif text is not None:
        from rich import print as show

        show(text)


def _runtime(device: str | None, precision: str, tracker: str | None = None, **options: Any) -> Any:
    """`options`: fields of `Runtime`, checked."""
    import torch

    from prunet.training import Runtime

    if precision not in ("auto", "no", "bf16", "fp16"):
        raise UserError(f"--precision {precision}: choose auto, no, bf16 or fp16")
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).splitlines()[0][:120]
            raise UserError(f"--device {device}: not to be had here ({first}); try cpu") from error
    if tracker is not None:
        from accelerate.tracking import get_available_trackers

        available = [str(t.value if hasattr(t, "value") else t) for t in get_available_trackers()]
        if tracker not in available:
            raise UserError(f"--tracker {tracker}: not installed; available: {', '.join(available) or 'none'}")
    chosen: Any = precision
    runtime = Runtime(device=device, precision=chosen, tracker=tracker, **options)
    for flag, on, package in (
        ("--use-8bit-adam", runtime.use_8bit_adam, "bitsandbytes"),
        ("--teacher-8bit", runtime.teacher_8bit, "torchao"),
    ):
        if on and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag}: needs {package}, which is not installed: pip install 'prunet[memory]'")
    if runtime.use_8bit_adam and runtime.torch_device.type != "cuda":
        raise UserError("--use-8bit-adam: for CUDA devices only")
    if runtime.fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UserError("--fsdp: shares the student out among several processes: start them with accelerate launch")
    if runtime.fsdp and (runtime.mixed_precision == "fp16" or runtime.use_8bit_adam):
        raise UserError("--fsdp: with --precision bf16 or no, and without --use-8bit-adam")
    if precision == "fp16" and runtime.torch_device.type == "cpu":
        raise UserError("--precision fp16: CPUs train in bf16 or no; fp16 is for GPUs")
    runtime.use_device()
    return runtime


def _weights(given: list[str] | None, examples: str) -> dict[str, Path]:
    """NAME=PATH, several of them, as a mapping."""
    files = {}
    for text in given or []:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise UserError(f"--weights {text}: write {examples}")
        files[name] = Path(path)
    return files


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    from prunet.recipe import load_recipe

    return load_recipe(path / "recipe.yaml" if path.is_dir() else path, overrides or ())


@app.command()
def inspect(
    teacher: TeacherArgument, plan: PlanOption = "none", config: ConfigOption = None, as_json: Json = False
) -> None:
    """Show what a plan does to a model, from its config alone: no weight is read.

    Example: prunet inspect sdxl --plan ssd-1b. Given a recipe (.yaml), it shows the recipe's plan on its teacher, and
    the way there if the stages remove step by step.
    """
    from prunet.drawing import draw_plan
    from prunet.plan import Plan, derive, load_plan
    from prunet.teacher import Teacher

    if teacher.endswith((".yaml", ".yml")):
        if plan != "none" or config is not None:
            raise UserError(f"{teacher}: a recipe names its own plan and teacher.config: leave --plan and --config out")
        return _inspect_recipe(Path(teacher), as_json)
    chosen = Plan("none") if plan == "none" else load_plan(plan)
    derived = derive(Teacher(teacher, config=config).unet_config, chosen)
    title = teacher if plan == "none" else f"{teacher} by {chosen.name}"
    _say(as_json, derived.facts() if as_json else {}, None if as_json else draw_plan(derived, title))


def _inspect_recipe(path: Path, as_json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from prunet.drawing import draw_plan, draw_stairs
    from prunet.plan import derive
    from prunet.student import check_steps
    from prunet.teacher import Teacher

    recipe = _recipe(path, None)
    source = recipe.teacher
    config = Teacher(source.source, config=source.config, revision=source.revision).unet_config
    derived, steps = derive(config, recipe.plan), [derive(config, plan) for plan in recipe.stage_plans]
    check_steps(steps)
    notes = [f"{stage.steps:,} x {stage.batch_size}" for stage in recipe.stages]
    title = f"{source.source} by {recipe.plan.name}"
    facts = derived.facts() | {"stages": [step.facts() for step in steps]} if as_json else {}
    _say(as_json, facts, None if as_json else Group(draw_plan(derived, title), Text(), draw_stairs(steps, notes)))


@app.command()
def plans(as_json: Json = False) -> None:
    """List the plans that come with prunet."""
    from rich.table import Table

    from prunet.plan import load_plan, preset_names

    found = [load_plan(name) for name in preset_names()]
    table = Table("plan", "what it removes", "source", box=None)
    for plan in found:
        table.add_row(f"[bold]{plan.name}[/]", plan.description, f"[dim]{plan.source}[/]")
    _say(
        as_json,
        {plan.name: {"remove": plan.remove, "description": plan.description} for plan in found},
        table,
    )


@app.command()
def build(
    teacher: TeacherArgument,
    plan: PlanOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the student.")],
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Make a student: what the plan leaves, with the teacher's weights, not yet distilled.

    Writes a stock diffusers U-Net folder (load it with UNet2DConditionModel.from_pretrained).
    """
    from prunet.plan import derive, load_plan
    from prunet.runs import save_unet
    from prunet.student import inherit
    from prunet.teacher import Teacher

    opened = Teacher(teacher, config=config)
    derived = derive(opened.unet_config, load_plan(plan))
    opened.check_weights()
    _refuse_foreign(output, "config.json")
    save_unet(inherit(opened.unet, derived), output)
    count = derived.student_size.parameters
    _say(as_json, {"output": str(output), "parameters": count}, f"{output}: a U-Net of {count:,} parameters")


def _refuse_foreign(folder: Path, own: str) -> None:
    """Nothing that prunet did not write is replaced."""
    if folder.exists() and not (folder.is_dir() and ((folder / own).exists() or not any(folder.iterdir()))):
        raise UserError(f"{folder}: exists and holds something else; give another --output")


def _run_until(until: str, path: Path, overrides: list[str] | None, runtime: Any, as_json: bool) -> Any:
    from prunet.runs import Run

    this = Run(_recipe(path, overrides), runtime)
    for step in this.step_names(until):
        this.do(step)
    facts = {"output": str(this.folder), "steps": {name: "done" for name in this.step_names(until)}}
    if until == "report":
        facts["evaluation"] = json.loads((this.folder / "evaluation" / "evaluation.json").read_text())["distance"]
        facts["report"] = str(this.folder / "report.html")
    _say(as_json, facts, _where(this.folder, until))
    return this


def _where(folder: Path, until: str) -> str:
    if until != "report":
        return f"[bold]{folder}[/]"
    return f"Report: [bold]{folder / 'report.html'}[/]\nPipeline: [bold]{folder / 'pipeline'}[/]"


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    micro_batch: Micro = None,
    gradient_checkpointing: Checkpointing = False,
    offload_ema: OffloadEma = False,
    use_8bit_adam: Adam8Bit = False,
    teacher_8bit: Teacher8Bit = False,
    fsdp: Fsdp = False,
    tracker: Tracker = None,
    as_json: Json = False,
) -> None:
    """Do a recipe: plan, build, cache, distil, evaluate, export, report.

    What is finished and valid is skipped, so the same command also resumes a run that was stopped.
    """
    chosen = _runtime(
        device,
        precision,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        offload_ema=offload_ema,
        use_8bit_adam=use_8bit_adam,
        teacher_8bit=teacher_8bit,
        fsdp=fsdp,
        tracker=tracker,
    )
    _run_until("report", recipe, overrides, chosen, as_json)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    micro_batch: Micro = None,
    gradient_checkpointing: Checkpointing = False,
    offload_ema: OffloadEma = False,
    use_8bit_adam: Adam8Bit = False,
    teacher_8bit: Teacher8Bit = False,
    fsdp: Fsdp = False,
    as_json: Json = False,
) -> None:
    """Tell what a recipe would do and cost: steps, peak memory by part, hours on this device.

    Memory comes from shapes, hours from a few steps of the real loop with random weights. Nothing is written.
    """
    from prunet.drawing import draw_estimate
    from prunet.estimate import estimate as cost_of
    from prunet.runs import Run

    runtime = _runtime(
        device,
        precision,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        offload_ema=offload_ema,
        use_8bit_adam=use_8bit_adam,
        teacher_8bit=teacher_8bit,
        fsdp=fsdp,
    )
    this = Run(_recipe(recipe, overrides), runtime)
    cost = cost_of(this)
    _say(as_json, cost, draw_estimate(this, cost))


@app.command()
def cache(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Do a recipe up to its cache: encode pictures and captions, or let the teacher draw the prompts."""
    _run_until("cache", recipe, overrides, _runtime(device, precision), as_json)


@app.command()
def distil(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    micro_batch: Micro = None,
    gradient_checkpointing: Checkpointing = False,
    offload_ema: OffloadEma = False,
    use_8bit_adam: Adam8Bit = False,
    teacher_8bit: Teacher8Bit = False,
    fsdp: Fsdp = False,
    tracker: Tracker = None,
    as_json: Json = False,
) -> None:
    """Do a recipe up to the distilled student; goes on from the last checkpoint."""
    chosen = _runtime(
        device,
        precision,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        offload_ema=offload_ema,
        use_8bit_adam=use_8bit_adam,
        teacher_8bit=teacher_8bit,
        fsdp=fsdp,
        tracker=tracker,
    )
    _run_until("distil", recipe, overrides, chosen, as_json)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    weights: Annotated[list[str] | None, typer.Option(help="vgg=FILE and lpips=FILE: measure LPIPS, too.")] = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Do a recipe up to its evaluation: sizes, speeds, and distance from the teacher before and after.

    LPIPS, too, given its weights; of a finished run it is added: prunet evaluate RUN --weights vgg=FILE
    --weights lpips=FILE
    """
    if files := _weights(weights, "vgg=FILE and lpips=FILE"):
        from prunet.features import declare_torchvision_ops

        declare_torchvision_ops()
    runtime = _runtime(device, precision)
    from prunet.lpips import Lpips, add_lpips
    from prunet.processes import is_main
    from prunet.report import write_report

    lpips = Lpips.load(files, runtime.torch_device) if files else None
    this = _run_until("evaluate", recipe, overrides, runtime, as_json)
    if lpips and is_main():
        add_lpips(this.folder / "evaluation", lpips)
        if this.is_done("report"):
            write_report(this.folder)
    if not as_json:
        from rich.markdown import Markdown

        _say(as_json, {}, Markdown((this.folder / "evaluation" / "evaluation.md").read_text()))


@app.command()
def ablate(
    ablation: Annotated[Path, typer.Argument(help="A YAML file: recipe, seeds and arms (see benchmarks/).")],
    overrides: SetOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once: one a GPU, or sharing the CPU's cores.")] = 1,
    device: Device = None,
    precision: PrecisionOption = "auto",
    micro_batch: Micro = None,
    as_json: Json = False,
) -> None:
    """Do one recipe in several ways, with several seeds each, and make one table with intervals.

    What is finished is skipped, so the same command goes on where it was stopped.
    """
    from prunet.ablation import ablate as do_all
    from prunet.ablation import load_ablation, markdown

    runtime = _runtime(device, precision, micro_batch=micro_batch)
    chosen, recipes = load_ablation(ablation, overrides or ())
    result = do_all(chosen, recipes, runtime, workers=workers)
    from rich.markdown import Markdown

    _say(as_json, result, Markdown(markdown(result)))


@app.command()
def protocols(as_json: Json = False) -> None:
    """List the protocols that come with prunet: what is drawn, and what is measured."""
    from rich.table import Table

    from prunet.protocol import load_protocol, protocol_names

    found = {name: load_protocol(name)[0] for name in protocol_names()}
    table = Table("protocol", "what it draws", "what it measures", box=None)
    for name, value in found.items():
        table.add_row(f"[bold]{name}[/]", value.description, ", ".join(value.metrics))
    _say(as_json, {name: value.model_dump(mode="json") for name, value in found.items()}, table)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders of `prunet measure`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, for run folders.")] = Path(
        "comparison.html"
    ),
    as_json: Json = False,
) -> None:
    """Put several runs side by side on one page, or the numbers of several measured models into one table.

    Refused if they were not measured alike, with what differs.
    """
    from prunet.comparison import write_comparison
    from prunet.measuring import compare as side_by_side
    from prunet.measuring import markdown

    if any((folder / "measures.json").is_file() for folder in folders):
        from rich.markdown import Markdown

        results = side_by_side(folders)
        return _say(as_json, {"results": results}, Markdown(markdown(results)))
    if output.suffix != ".html" or output.is_dir():
        raise UserError(f"--output {output}: name the page something.html")
    page = write_comparison(folders, output)
    _say(as_json, {"page": str(page)}, f"Page: [bold]{page}[/]")


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="Pipeline folder, .safetensors file, hub id, or run folder.")],
    protocol: Annotated[str, typer.Option(help="A protocol's name (see `prunet protocols`) or a YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures and numbers; of a run: RUN/measured/PROTOCOL."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="The protocol's prompts: .txt, .csv or .tsv.")] = None,
    real: Annotated[
        Path | None, typer.Option(help="Real pictures (folder), features prunet saved, or pytorch-fid's .npz.")
    ] = None,
    weights: Annotated[list[str] | None, typer.Option(help="inception=FILE or clip=PATH: of the networks.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first N prompts: to try it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    config: ConfigOption = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw a protocol's prompts and measure the pictures: FID, KID, CLIP score and others, with intervals.

    Resumable. Several processes share the work: accelerate launch -m prunet measure MODEL --protocol NAME -o FOLDER.
    What is measured of a run goes into its report, too.

    Example: prunet measure runs/demo --protocol emoji/protocols/emoji-train.yaml
    """
    from prunet.features import declare_torchvision_ops

    declare_torchvision_ops()
    from prunet.measuring import markdown
    from prunet.measuring import measure as measure_it
    from prunet.protocol import load_protocol, protocol_prompts

    chosen, beside = load_protocol(protocol)
    texts = protocol_prompts(chosen, beside, prompts, limit)
    is_run = (Path(model) / "recipe.yaml").is_file()
    if output is None and not is_run:
        raise UserError(f"{model}: is no run folder: say where the pictures and numbers go with --output FOLDER")
    files = _weights(weights, "inception=FILE or clip=PATH")
    runtime = _runtime(device, "no")
    result = measure_it(
        model,
        chosen,
        texts,
        output or Path(model) / "measured" / chosen.name,
        beside=beside,
        real=real,
        weights=files,
        config=config,
        device=runtime.torch_device,
        batch_size=batch_size,
    )
    if result:
        from rich.markdown import Markdown

        from prunet.report import write_report

        _say(as_json, result, Markdown(markdown([result])))
        if output is None and (Path(model) / "report.html").is_file():
            write_report(model)


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(help="Pipeline folders, .safetensors files, hub ids or run folders; the first is the baseline."),
    ],
    plans: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="Also what this plan leaves of the baseline, not trained; several times."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels; the baseline's own by default.")] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Pictures at once; may be given several times.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps, to add up the time of a picture.")] = 25,
    repeats: Annotated[
        int, typer.Option(min=3, help="Calls of each, of which the median counts; fewer after a minute, but three.")
    ] = 15,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time the denoisers by torch.compile, too (minutes each on a CPU).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.md, bench.svg (the chart) and bench.json.")
    ] = None,
    config: ConfigOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Time a teacher and its students side by side: text, denoiser, VAE, pictures a second, peak memory.

    All calls take turns, so that what disturbs the machine disturbs them all. A student's speed-up is shown beside what
    its multiply-adds (MACs) allow: twice as fast for half the MACs. Where it reaches less than 90 % of that, the table
    tells which operations take the rest.

    Example: prunet bench my-model runs/mine --batch-size 1 --batch-size 4 -o runs/mine/bench

    Before anything is trained: prunet bench my-model --plan bk-small --plan bk-tiny
    """
    from rich.markdown import Markdown

    from prunet.files import clear_errors
    from prunet.inference import bench as time_all
    from prunet.inference import check_compiler, open_pipelines
    from prunet.speeds import markdown, write_speeds

    runtime = _runtime(device, precision)
    if output is not None:
        _refuse_foreign(output, "bench.json")
        with clear_errors(output):
            output.mkdir(parents=True, exist_ok=True)
    if compiled:
        check_compiler(runtime.torch_device)
    where = {"device": runtime.torch_device, "dtype": runtime.dtype}
    result = time_all(
        open_pipelines(models, plans or (), size=size, config=config, **where),
        size=size,
        batch_sizes=list(dict.fromkeys(batch_sizes or [1])),
        steps=steps,
        repeats=repeats,
        compiled=compiled,
    )
    if output is not None:
        write_speeds(result, output)
    _say(as_json, result, Markdown(markdown(result)))


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A run folder whose distillation is finished.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="RUN/pipeline, or RUN/student.safetensors.")
    ] = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="The original LDM layout as one file.")] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half precision (a folder gets the fp16 variant as well).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the student of a run as a stock pipeline folder, or as one .safetensors for ComfyUI and others."""
    from prunet.pipeline import export as export_folder
    from prunet.pipeline import export_single_file
    from prunet.runs import Run, load_unet

    if not (run_folder / "recipe.yaml").is_file():
        raise UserError(f"{run_folder}: not a run folder (no recipe.yaml); `prunet run RECIPE` makes one")
    if single_file and output is not None and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: name the single file something.safetensors")
    if single_file and output is not None and output.exists():
        raise UserError(f"--output {output}: exists; delete it first, or give another name")
    this = Run(_recipe(run_folder, [f"output={json.dumps(str(run_folder))}"]))
    if not this.result_of("evaluate").is_file():
        raise UserError(f"{run_folder}: not evaluated yet; finish it with `prunet run {run_folder}`")
    if single_file:
        if not this.is_done("export"):
            this.do("export")
        written = export_single_file(run_folder / "pipeline", output or run_folder / "student.safetensors", fp16=fp16)
    else:
        target = output or run_folder / "pipeline"
        _refuse_foreign(target, "model_index.json")
        written = export_folder(this.exported_teacher(), load_unet(this.last_unet), target, card=this.card(), fp16=fp16)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.rglob("*.safetensors")))
    _say(
        as_json,
        {"output": str(written), "bytes": size},
        f"[bold]{written}[/]: {size / 1e6:,.1f} MB of weights",
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Pipeline folder, .safetensors file, hub id, or run folder.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture, or folder if there are several.")] = Path(
        "generated"
    ),
    num_images: Annotated[int, typer.Option("-n", "--num-images", min=1)] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", "-g", min=0)] = 7.5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own by default.")] = None,
    sampler: Annotated[str, typer.Option(help="dpmsolver++, ddim, pndm, euler, euler-a or unipc.")] = "dpmsolver++",
    config: ConfigOption = None,
    device: Device = None,
    precision: PrecisionOption = "auto",
    as_json: Json = False,
) -> None:
    """Draw pictures of a prompt with a pipeline: a teacher, a student, or the student of a run.

    Example: prunet generate runs/demo "a red apple" -n 4
    """
    from prunet.files import new_file
    from prunet.pipeline import generate as draw_pictures

    runtime = _runtime(device, precision)
    one_file = output.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    if one_file and num_images > 1:
        raise UserError(f"--output {output}: {num_images} pictures need a folder, not one file")
    if not one_file and output.is_file():
        raise UserError(f"--output {output}: is a file that is no picture; give a folder or something.png")
    pictures = draw_pictures(
        model,
        prompt,
        num_images=num_images,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        size=size,
        sampler=sampler,
        config=config,
        device=runtime.torch_device,
        dtype=runtime.dtype,
    )
    paths = [output] if one_file else [output / f"{seed + i:06d}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        with new_file(path) as part:
            picture.save(
                part,
                format={".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"),
            )
    _say(as_json, {"pictures": [str(p) for p in paths]}, "\n".join(str(p) for p in paths))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"prunet {__version__}")
        raise typer.Exit
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and context.invoked_subcommand not in SHARED:
        raise UserError(
            f"prunet {context.invoked_subcommand}: works in one process; accelerate launch and torchrun are for "
            f"{', '.join(SHARED)}"
        )


def main() -> None:
    """Runs the command line; a `UserError` is one line on stderr and exit code 2."""
    _quiet()
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "prunet"
        _fail(f"{error.format_message()} (see `{verb} --help`)")
    except (KeyboardInterrupt, typer.Abort):
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("Out of memory: lower --micro-batch, add --gradient-checkpointing, or lower data.size")
    sys.exit(code or 0)


def _fail(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"error{where}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error)


def _quiet() -> None:
    """Libraries warn about things that are prunet's business, not the user's."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|diffusers|transformers|accelerate)")
