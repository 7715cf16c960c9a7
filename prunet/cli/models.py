"""Verbs for models: inspect a plan, build a student, draw with it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import (
    RUNTIME,
    CacheOption,
    CompareOption,
    ConfigOption,
    Json,
    PlanOption,
    PromptsOption,
    TeacherArgument,
    app,
    drawing_asked,
    open_recipe,
    say,
    with_runtime,
)
from prunet.errors import UserError


@app.command()
@with_runtime("device", "precision", later=True)
def inspect(
    runtime: Any,
    teacher: Annotated[
        str,
        typer.Argument(
            help="diffusers folder, .safetensors file, hub id, recipe, run, or layout (sd-v1, sdxl, flux-dev, ...)."
        ),
    ],
    plan: PlanOption = "none",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure the cost and the error of each removal (reads weights).")
    ] = False,
    prompts: PromptsOption = None,
    cache: CacheOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --sensitivity: folder for a page, a chart and numbers.")
    ] = None,
    guidance_scale: CompareOption = 7.5,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Show what a plan does to a model, without reading weights.

    For a recipe (.yaml) or a run folder, it shows the recipe's plan on its teacher, and what each stage removes.

    Example: prunet inspect sdxl --plan ssd-1b

    The cost and the error of each removal: prunet inspect my-model --sensitivity
    """
    from prunet.recipe.paths import shipped_names

    computes = any(value != RUNTIME[name][1] for name, value in runtime.keywords.items())
    if not sensitivity and (prompts or cache or output or computes or guidance_scale != 7.5):
        raise UserError(
            "--prompts, --cache, --guidance-scale, --output, --device and --precision are for --sensitivity: add it, "
            "or leave them out"
        )
    is_recipe = teacher.endswith((".yaml", ".yml")) or teacher in shipped_names(".yaml")
    if is_recipe or (Path(teacher) / "recipe.yaml").is_file():
        if plan != "none" or config is not None or sensitivity:
            raise UserError(
                f"{teacher}: a recipe names its own plan and teacher.config: leave --plan, --config and --sensitivity "
                "out, or give the model itself"
            )
        _inspect_recipe(Path(teacher), as_json)
        return
    if sensitivity:
        if plan != "none":
            raise UserError("--sensitivity: measures all parts of a model: leave --plan out")
        _inspect_sensitivity(teacher, runtime(), prompts, cache, output, config, guidance_scale, as_json)
        return
    _inspect_plan(teacher, plan, config, as_json)


def _inspect_plan(source: str, plan: str, config: str | None, as_json: bool) -> None:
    from prunet.cli.views import plan_view
    from prunet.plan.effect import shipped_effect
    from prunet.plan.plan import Plan, load_plan
    from prunet.teacher.known import LAYOUTS

    chosen = Plan("none") if plan == "none" else load_plan(plan)
    title = source if plan == "none" else f"{source} by {chosen.name}"
    is_layout = source in LAYOUTS and config is None and not Path(source).exists()
    effect = shipped_effect(source, plan) if is_layout and not as_json else None
    if effect is not None:
        say(as_json, {}, plan_view(effect, title))
        return
    with _without_collection():
        from prunet.plan.derived import derive
        from prunet.teacher.teacher import Teacher

        opened = Teacher(source, config=config, only_form=True)
        derived = derive(opened.unet_config, chosen)
        opened.check_weights(headers_only=True)
        _say_effect(as_json, derived, opened, title)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Stops the search for unused objects: it would take a fifth of the time of the imports and find none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _inspect_sensitivity(
    source: str,
    runtime: Any,
    prompts: Path | None,
    cache: Path | None,
    output: Path | None,
    config: str | None,
    guidance_scale: float,
    as_json: bool,
) -> None:
    from prunet.cli.views import sensitivity_view
    from prunet.disk.ownership import check_place, hold
    from prunet.recipe.prompts import read_prompt_file
    from prunet.report.sensitivity import write_sensitivity
    from prunet.search.scores import Scores
    from prunet.search.sensitivity import check_samples, open_examples
    from prunet.search.sensitivity import sensitivity as measure
    from prunet.search.units import find_units
    from prunet.teacher.teacher import Teacher

    texts = read_prompt_file(prompts) if prompts else None
    teacher = Teacher(source, config=config, device=runtime.torch_device, dtype=runtime.dtype, only_form=True)
    if output is not None:
        check_place(output, "sensitivity", "--output", [Path(source), *([cache] if cache else [])])
    check_samples(teacher, texts, cache, guidance_scale)
    teacher.check_weights()
    units = find_units(teacher.unet_config)
    if not units:
        raise UserError(f"{teacher.source}: nothing can be removed")
    with hold(output, "sensitivity") if output else nullcontext():
        file = output and output / "examples.safetensors"
        examples = open_examples(teacher, texts, cache, file, guidance_scale)
        result = measure(units, Scores(teacher, examples, output))
        if output is not None:
            write_sensitivity(result, output)
    say(as_json, result.facts(), None if as_json else sensitivity_view(result))


def _inspect_recipe(path: Path, as_json: bool) -> None:
    from prunet.cli.views import stairs_view
    from prunet.student.student import check_steps, derive_stages
    from prunet.teacher.teacher import Teacher

    recipe = open_recipe(path, None)
    source = recipe.teacher
    teacher = Teacher(source.source, config=source.config, revision=source.revision)
    config = teacher.unet_config
    teacher.check_weights(headers_only=True)
    derived, steps = derive_stages(config, recipe)
    check_steps(steps)
    notes = [f"{stage.steps:,} x {stage.batch_size}" for stage in recipe.stages]
    title = f"{source.source} by {recipe.plan.name}"
    more = {"stages": [step.result().facts() for step in steps]} if as_json else {}
    last = recipe.stages[-1].teacher  # whose pipeline the student gets
    if last is not None:
        teacher = Teacher(last.source, config=last.config, revision=last.revision)
    _say_effect(as_json, derived, teacher, title, more, None if as_json else stairs_view(steps, notes))


def _say_effect(
    as_json: bool, derived: Any, teacher: Any, title: str, more: dict[str, Any] | None = None, below: Any = ""
) -> None:
    """Says what a plan does to a teacher, with `more` facts, or with a view `below` it."""
    from rich.console import Group

    from prunet.cli.views import plan_view
    from prunet.runs.card import loads_in

    programs = {"loads_in": loads_in(derived, teacher)}
    if as_json:
        say(as_json, derived.result().facts() | programs | (more or {}))
    else:
        view = plan_view(derived.effect().model_copy(update=programs), title)
        say(as_json, {}, Group(view, "", below) if below else view)


@app.command()
def plans(as_json: Json = False) -> None:
    """List the plans that come with prunet."""
    from rich.table import Table

    from prunet.plan.plan import load_plan, preset_names

    found = [load_plan(name) for name in preset_names()]
    table = Table("plan", "what it is", "source", box=None)
    for plan in found:
        table.add_row(f"[bold]{plan.name}[/]", plan.description, f"[dim]{plan.source}[/]")
    say(
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
    """Make a plan's student with the teacher's weights, not yet distilled.

    The output is a stock diffusers folder of the denoiser: load it with the class that is printed, such as
    UNet2DConditionModel.from_pretrained(FOLDER).
    """
    from prunet.disk.files import check_writable
    from prunet.disk.ownership import check_place
    from prunet.plan.derived import derive
    from prunet.plan.plan import load_plan
    from prunet.student.folder import save_unet
    from prunet.student.student import inherit
    from prunet.teacher.teacher import Teacher

    check_place(output, "student", "--output", [Path(teacher)])
    check_writable(output, "--output")
    opened = Teacher(teacher, config=config, only_form=True)
    derived = derive(opened.unet_config, load_plan(plan))
    opened.check_weights()
    save_unet(inherit(opened.unet, derived), output, "student")
    count = derived.student_size.parameters
    say(
        as_json,
        {"output": str(output), "parameters": count},
        f"{output}: a {derived.architecture.class_name} of {count:,} parameters",
    )


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A pickled checkpoint: .ckpt, .pt, .pth or .bin.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new file; FILE.safetensors by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the tensors of a pickled checkpoint as .safetensors, without running the code in the pickle."""
    from prunet.teacher.conversion import convert as convert_pickle

    facts = convert_pickle(checkpoint, output)
    dropped = f"\nleft out: {', '.join(facts['dropped'])}" if facts["dropped"] else ""
    text = f"{facts['output']}: {facts['tensors']:,} tensors, {facts['bytes'] / 1e6:,.1f} MB{dropped}"
    say(as_json, facts, text)


@app.command()
@with_runtime("device", "precision")
def generate(
    runtime: Any,
    model: Annotated[
        str,
        typer.Argument(help="Pipeline folder (also for OpenVINO or ONNX), .safetensors file, hub id, or run folder."),
    ],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture, or folder: a file for each seed.")] = Path(
        "generated"
    ),
    num_images: Annotated[int, typer.Option("-n", "--num-images", min=1, help="Number of pictures.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps: 25, or as many as the model was made for.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "-g", min=0, help="7.5, or the scale that the model was made for."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first picture; each next has one more.")] = 0,
    size: Annotated[int | None, typer.Option(min=8, max=4096, help="Pixels; the model's own by default.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="dpmsolver++, or the model's own; ddim, ddim-trailing, pndm, euler, euler-a, lcm, unipc."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from (image to image).")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image changes, up to 1; by default 0.6, with --mask 1.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Draw only where it is white (inpainting); as large as --image.")
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Draw pictures of a prompt with a teacher, a student, or the student of a run.

    Example: prunet generate runs/demo "a red apple" -n 4

    From a picture: prunet generate runs/demo "a red apple" --image pear.png --strength 0.6
    """
    from prunet.data.pictures import read_mask, read_picture
    from prunet.disk.files import check_writable
    from prunet.disk.ownership import check_file, check_place, hold
    from prunet.sampling.draw import PICTURE_FORMATS, Model, is_drawn
    from prunet.sampling.draw import generate as draw_pictures
    from prunet.sampling.start import StartPicture

    one_file = output.suffix.lower() in PICTURE_FORMATS
    if one_file and num_images > 1:
        raise UserError(f"--output {output}: {num_images} pictures need a folder, not one file")
    if not one_file and output.is_file():
        raise UserError(f"--output {output}: a file that is not a picture: give a folder or NAME.png")
    if not one_file:
        check_place(output, "pictures", "--output", [Path(model)])
    check_writable(output.parent if one_file else output, "--output")
    drawing = drawing_asked(steps, guidance_scale, sampler)
    paths = [output] if one_file else [output / f"{seed + i:06d}.png" for i in range(num_images)]
    for path in paths:
        check_file(path, "picture", "--output", is_drawn, [read for read in (image, mask) if read])
        if not one_file and path.exists() and not is_drawn(path, prompt):
            raise UserError(f"--output {path}: a picture of another prompt: give another folder, or another --seed")
    start = None
    if image is not None:
        start = StartPicture(read_picture(image, "--image"), strength, read_mask(mask, "--mask") if mask else None)
    elif (strength, mask) != (None, None):
        raise UserError(f"--{'mask' if strength is None else 'strength'}: needs a picture to start from: add --image")
    with nullcontext() if one_file else hold(output, "pictures"):
        draw_pictures(
            Model(model, config, runtime.torch_device, runtime.dtype),
            prompt,
            num_images=num_images,
            drawing=drawing,
            start=start,
            seed=seed,
            size=size,
            save_to=paths,
        )
    say(as_json, {"pictures": [str(p) for p in paths]}, "\n".join(str(p) for p in paths))
