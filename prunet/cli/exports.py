"""Verbs that write a run's student for other programs: a stock pipeline, a single file, a folder for a runtime."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunet.cli.options import Json, app, open_recipe, say, with_runtime
from prunet.errors import UserError
from prunet.extras import EXTRAS, check_extra
from prunet.words import command, percent

if TYPE_CHECKING:
    from prunet.runs.run import Run


#: The forms of export that are asked for by an option, and of the other options the forms that each is for ("": a
#: stock folder).
FORMS = ("--single-file", "--gguf", "--openvino", "--onnx", "--coreml")
FITS = {
    "--for": ("--single-file",),
    "--fp16": ("", "--single-file"),
    "--int8": ("--openvino",),
    "--int8-weights": ("--openvino", "--coreml"),
    "--palettized": ("--coreml",),
    "--decoder": ("--openvino", "--onnx", "--coreml"),
}


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="The run folder of an evaluated student.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="RUN/pipeline, RUN/student.safetensors, RUN/openvino, ... by default."),
    ] = None,
    single_file: Annotated[bool, typer.Option("--single-file", help="The original LDM layout as one file.")] = False,
    program: Annotated[
        Literal["comfyui", "sd.cpp"] | None,
        typer.Option("--for", help="With --single-file: the program that opens it; comfyui includes diffusers."),
    ] = None,
    gguf: Annotated[
        Literal["q8_0", "q4_0"] | None,
        typer.Option(help="One GGUF file for stable-diffusion.cpp, with matrices in 8 or 4 bits."),
    ] = None,
    fp16: Annotated[
        bool | None,
        typer.Option(help="Half precision (a folder gets the fp16 variant as well); by default the recipe's."),
    ] = None,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="A folder for OpenVINO GenAI, which draws on CPUs without torch.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="A folder of ONNX models of any batch and size.")] = False,
    coreml: Annotated[bool, typer.Option("--coreml", help="A folder for Apple's package StableDiffusion.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --openvino: also the U-Net's activations in 8 bits; least exact.")
    ] = False,
    int8_weights: Annotated[
        bool,
        typer.Option("--int8-weights", help="With --openvino, --coreml: weights of U-Net and text encoders in 8 bits."),
    ] = False,
    palettized: Annotated[
        bool, typer.Option("--palettized", help="With --coreml: these weights in 6 bits, which choose among 64 values.")
    ] = False,
    decoder: Annotated[
        Path | None,
        typer.Option(help="With --openvino, --onnx, --coreml: an AutoencoderTiny (`prunet decoder`) for the VAE."),
    ] = None,
    to_hub: Annotated[
        str | None, typer.Option("--push", help="Also upload it to owner/name on the hub; a new repository is private.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the student of a run as a stock pipeline, as one file, or as a folder for a runtime other than torch.

    Example: prunet export runs/demo --openvino --int8
    """
    from prunet.exports.hub import check_push, push
    from prunet.exports.single_file import check_for_cpp
    from prunet.runs.checks import read_paths
    from prunet.runs.run import Run

    form = _form_of(dict(zip(FORMS, (single_file, gguf, openvino, onnx, coreml), strict=True)))
    bits = _bits_of({"int8": int8, "int8-weights": int8_weights, "palettized": palettized})
    options = (program, fp16, int8, int8_weights, palettized, decoder)
    _check_options(form, dict(zip(FITS, options, strict=True)))
    _check_run(run_folder)
    is_file = form in ("--single-file", "--gguf")
    name = _file_name(program, gguf) if is_file else "-".join(filter(None, (form[2:], bits)))
    own = run_folder / (name or "pipeline")
    target = output or own
    elsewhere = os.path.realpath(target) != os.path.realpath(own)
    recipe = open_recipe(run_folder, [f"output={json.dumps(str(run_folder))}"])
    read = [*read_paths(recipe), *([decoder] if decoder else [])]
    what = form[2:] or ("pipeline" if elsewhere else "export")
    _check_target(target, None if is_file else what, gguf, read)
    this = _evaluated(Run(recipe))
    if gguf or program == "sd.cpp":
        check_for_cpp(this.derived.student_config)
    if to_hub:
        check_push(to_hub)
    with nullcontext() if elsewhere else this.at_work():
        if form and not is_file:
            facts, text = _for_runtime(this, form, target, bits, decoder)
        else:
            file = {"program": program or "comfyui", "bits": gguf} if is_file else None
            facts, text = _stock(this, target, what, recipe.export.fp16 if fp16 is None else fp16, file)
    card = this.folder / "pipeline" / "README.md" if is_file else None
    pushed = push(target, to_hub, card) if to_hub else None
    say(as_json, {"output": str(target), **facts, "pushed": pushed}, f"{pushed}\n{text}" if pushed else text)


@app.command()
@with_runtime("device")
def decoder(
    runtime: Any,
    run_folder: Annotated[Path, typer.Argument(help="A run folder with its cache.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 8 latents.")] = 5000,
    as_json: Json = False,
) -> None:
    """Distil a small decoder from the VAE of a run's teacher, on the run's cached latents, into RUN/decoder.

    The decoder draws in a fraction of the VAE's time: in diffusers (vae=), or with prunet export --openvino --decoder
    RUN/decoder. The same command resumes. If a TAESD exists for the teacher, use it: it needs no training.
    """
    from prunet.runs.decoder import make_decoder
    from prunet.runs.run import Run

    _check_run(run_folder)
    this = Run(open_recipe(run_folder, [f"output={json.dumps(str(run_folder))}"]), runtime)
    with this.at_work():
        found = make_decoder(this, steps)
    folder = run_folder / "decoder"
    text = f"PSNR {found.psnr:.1f} dB against the VAE's pictures on {found.held_out} held-out samples"
    time = f"{percent(found.share)} of its time ({found.ms['small']:.1f} ms)"
    say(as_json, {"output": str(folder), **found.facts()}, f"{folder}: {text}, {time}")


def _check_run(folder: Path) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no recipe.yaml); `prunet run RECIPE` makes one")


def _evaluated(run: "Run") -> "Run":
    """Returns the run; refuses it if it has no evaluation, or if its teacher lacks a part of the pipeline."""
    from prunet.teacher.copying import check_other_parts

    if not run.result_of("evaluate").is_file():
        raise UserError(f"{run.folder}: not evaluated yet; finish it with {command('run', run.folder)}")
    check_other_parts(run.teachers[-1])
    return run


def _check_target(target: Path, folder: str | None, gguf: str | None, read: list[Path]) -> None:
    """Refuses a target that holds something else or has a wrong name. `folder`: its kind; None: a single file."""
    from prunet.disk.files import check_writable
    from prunet.disk.ownership import check_file, check_place
    from prunet.exports.single_file import check_name, is_exported

    check_writable(target.parent if folder is None else target, "--output")
    if folder is not None:
        check_place(target, folder, "--output", read)
        return
    check_name(target, gguf)
    other = target.with_suffix(".safetensors" if target.suffix == ".gguf" else ".gguf")
    if other.exists():
        raise UserError(
            f"--output {target}: its configs would replace those of {other.name} beside it: give another name"
        )
    check_file(target, "single file", "--output", is_exported, read)
    check_place(target.with_suffix(".config"), "configs", "--output", read)  # the file's configs go there


def _form_of(forms: dict[str, Any]) -> str:
    """Returns the form that is asked for by its option; "": a stock folder."""
    asked = [name for name, given in forms.items() if given]
    if len(asked) > 1:
        raise UserError(f"{asked[0]} {asked[1]}: one export at a time: leave one of them out")
    return asked[0] if asked else ""


def _bits_of(options: dict[str, bool]) -> str | None:
    """Returns how weights are stored, as the name of the option that asks for it; None: not in fewer bits."""
    asked = [name for name, given in options.items() if given]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} --{asked[1]}: choose one of them")
    return asked[0] if asked else None


def _check_options(form: str, options: dict[str, Any]) -> None:
    """Refuses an option that the form of export does not have, and a form whose packages are not installed."""
    for name, forms in FITS.items():
        if options[name] and form not in forms:
            wanted = " or ".join(form or "a stock folder" for form in forms)
            if form:
                raise UserError(f"{form} {name}: {name} is for {wanted}: leave one of them out")
            raise UserError(f"{name}: needs {wanted}: add it, or leave {name} out")
    if (extra := form[2:]) in EXTRAS:
        check_extra(extra, form)


def _file_name(program: str | None, gguf: str | None) -> str:
    return f"student-{gguf}.gguf" if gguf else f"student{'-sd-cpp' if program == 'sd.cpp' else ''}.safetensors"


def _stock(this: "Run", target: Path, what: str, fp16: bool, file: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Writes a folder sealed as `what`, or a single file of the form `file`."""
    from prunet.exports.folder import export as export_folder
    from prunet.exports.single_file import export_single_file
    from prunet.runs.card import card_facts, loads_in

    loads = loads_in(this.derived, this.teachers[-1])
    if file and (file["bits"] or file["program"] == "sd.cpp"):
        loads = {"stable-diffusion.cpp, single file": "yes"}  # other programs do not read this file
    if file:
        if not this.is_done("export"):
            this.do("export")
        written = export_single_file(this.folder / "pipeline", target, fp16=fp16, **file)
    else:
        how: dict[str, Any] = {"card": card_facts(this), "fp16": fp16, "drawing": this.recipe.made_for, "what": what}
        written = export_folder(this.exported_teacher(), this.last_unet(), target, **how)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.rglob("*.safetensors")))
    return (
        {"bytes": size, "loads_in": loads, "works_with": this.derived.works_with},
        f"{written}: {size / 1e6:,.1f} MB of weights\n"
        + "\n".join(f"  {program}: {answer}" for program, answer in loads.items()),
    )


def _for_runtime(this: "Run", form: str, target: Path, bits: Any, decoder: Path | None) -> tuple[dict[str, Any], str]:
    """Writes a folder for a runtime other than torch."""
    from prunet.recipe.recipe import read_prompts
    from prunet.recipe.values import Drawing
    from prunet.runs.card import card_facts

    if not this.is_done("export"):
        this.do("export")
    recipe = this.recipe
    drawing = recipe.made_for or Drawing(**recipe.evaluation.model_dump(include=set(Drawing.model_fields)))
    prompts, card = read_prompts(recipe.evaluation.prompts), card_facts(this)
    given: Any = this.folder / "pipeline", target, prompts, drawing
    how: Any = {"card": card, "decoder": decoder}
    if form == "--onnx":
        from prunet.exports.onnx import export_onnx

        facts = export_onnx(*given, **how)
        apart = max(model["apart"] for model in facts["models"].values())
        more = f"\n  within {apart:.0e} of what torch computes, of the largest output"
    elif form == "--coreml":
        from prunet.exports.coreml import export_coreml

        facts = export_coreml(*given, **how, bits=bits)
        more = "\n  a Mac compiles them (README.md); they were not run here"
    else:
        from prunet.exports.openvino import export_openvino
        from prunet.report.run import write_report
        from prunet.report.runtimes import better_trades, exported

        facts = export_openvino(*given, **how, bits=bits)
        more = (
            f", {facts['seconds']:.2f} s a picture\n"
            f"  pictures compared with those of 16-bit weights in f32: PSNR {facts['psnr']:.1f} dB, root mean squared "
            f"error {facts['picture']:.4f}, over {facts['prompts']} prompts"
        )
        if len(all_of_run := exported(this.folder, facts["pipeline"])) > 1:
            more += "".join(f"\n  {line}" for line in ("Side by side:", *all_of_run, *better_trades(all_of_run)))
        if (this.folder / "report.html").is_file():
            write_report(this.folder)
    return facts, f"{target}: {facts['bytes'] / 1e6:,.1f} MB of models{more}"
