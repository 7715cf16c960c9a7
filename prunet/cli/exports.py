"""Verbs that write a run's student for other programs: as a stock pipeline, a single file, a folder for OpenVINO."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunet.cli.options import Json, app, open_recipe, say, with_runtime
from prunet.errors import UserError
from prunet.words import command, percent

if TYPE_CHECKING:
    from prunet.runs.run import Run


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="The run folder of an evaluated student.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="RUN/pipeline, RUN/student.safetensors or RUN/openvino by default."),
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
        bool, typer.Option("--fp16", help="Half precision (a folder gets the fp16 variant as well).")
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="A folder for OpenVINO GenAI, which draws on CPUs without torch.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --openvino: also the U-Net's activations in 8 bits; least exact.")
    ] = False,
    int8_weights: Annotated[
        bool, typer.Option("--int8-weights", help="With --openvino: weights of U-Net and text encoders in 8 bits.")
    ] = False,
    decoder: Annotated[
        Path | None,
        typer.Option(help="With --openvino: an AutoencoderTiny in place of the VAE, by `prunet decoder` or TAESD."),
    ] = None,
    to_hub: Annotated[
        str | None, typer.Option("--push", help="Also upload it to owner/name on the hub; a new repository is private.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the student of a run as a stock pipeline, as one file for ComfyUI or stable-diffusion.cpp, or for OpenVINO.

    Example: prunet export runs/demo --openvino --int8
    """
    from prunet.exports.hub import check_push, push
    from prunet.exports.single_file import check_for_cpp
    from prunet.runs.checks import read_paths
    from prunet.runs.run import Run

    asked = {"--int8": int8, "--int8-weights": int8_weights, "--decoder": decoder}
    _check_options(openvino, asked, {"--single-file": single_file, "--gguf": gguf, "--fp16": fp16})
    single_file |= bool(gguf)
    _check_form(single_file, program, gguf, fp16)
    _check_run(run_folder)
    bits = "int8" if int8 else "int8-weights" if int8_weights else None
    name = _file_name(program, gguf) if single_file else "-".join(filter(None, ("openvino", bits)))
    own = run_folder / (name if single_file or openvino else "pipeline")
    target = output or own
    elsewhere = os.path.realpath(target) != os.path.realpath(own)
    recipe = open_recipe(run_folder, [f"output={json.dumps(str(run_folder))}"])
    read = [*read_paths(recipe), *([decoder] if decoder else [])]
    what = "openvino" if openvino else "pipeline" if elsewhere else "export"
    _check_target(target, None if single_file else what, gguf, read)
    this = _evaluated(Run(recipe))
    if gguf or program == "sd.cpp":
        check_for_cpp(this.derived.student_config)
    if to_hub:
        check_push(to_hub)
    with nullcontext() if elsewhere else this.at_work():
        if openvino:
            facts, text = _for_openvino(this, target, bits, decoder)
        else:
            file = {"program": program or "comfyui", "bits": gguf} if single_file else None
            facts, text = _stock(this, target, what, fp16, file)
    pushed = push(target, to_hub) if to_hub else None
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
        facts = make_decoder(this, steps)
    folder = run_folder / "decoder"
    text = f"PSNR {facts['psnr']:.1f} dB against the VAE's pictures on {facts['held_out']} held-out samples"
    time = f"{percent(facts['share'])} of its time ({facts['ms']['small']:.1f} ms)"
    say(as_json, {"output": str(folder), **facts}, f"{folder}: {text}, {time}")


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
    from prunet.disk.ownership import check_file, check_place
    from prunet.exports.single_file import check_name, is_exported

    if folder is not None:
        check_place(target, folder, "--output", read)
        return
    check_name(target, gguf)
    check_file(target, "single file", "--output", is_exported, read)
    check_place(target.with_suffix(".config"), "configs", "--output", read)  # the file's configs go there


def _check_options(openvino: bool, its: dict[str, Any], others: dict[str, Any]) -> None:
    """Refuses options that exclude each other. `its`: options of --openvino and their values; `others`: of the rest."""
    given = [[name for name, value in options.items() if value] for options in (its, others)]
    if given[0] and not openvino:
        raise UserError(f"{given[0][0]}: needs --openvino: add it, or leave {given[0][0]} out")
    if openvino and given[1]:
        raise UserError(f"--openvino {given[1][0]}: one export at a time: leave one of them out")
    if its["--int8"] and its["--int8-weights"]:
        raise UserError("--int8 --int8-weights: choose one of them")


def _check_form(single_file: bool, program: str | None, gguf: str | None, fp16: bool) -> None:
    """Refuses options of a single file that exclude each other, and GGUF without its package."""
    from prunet.exports.gguf import need_gguf

    if program and not single_file:
        raise UserError("--for: needs --single-file: add it, or leave --for out")
    if gguf and program == "comfyui":
        raise UserError("--gguf --for comfyui: a GGUF file is for sd.cpp: leave one of them out")
    if gguf and fp16:
        raise UserError("--gguf --fp16: weights of a GGUF file have 8, 4 or 16 bits already: leave --fp16 out")
    if gguf:
        need_gguf()


def _file_name(program: str | None, gguf: str | None) -> str:
    return f"student-{gguf}.gguf" if gguf else f"student{'-sd-cpp' if program == 'sd.cpp' else ''}.safetensors"


def _stock(this: "Run", target: Path, what: str, fp16: bool, file: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Writes a folder sealed as `what`, or a single file of the form `file`."""
    from prunet.exports.folder import export as export_folder
    from prunet.exports.single_file import export_single_file
    from prunet.runs.card import card_facts

    if file:
        if not this.is_done("export"):
            this.do("export")
        written = export_single_file(this.folder / "pipeline", target, fp16=fp16, **file)
    else:
        how: dict[str, Any] = {"card": card_facts(this), "fp16": fp16, "drawing": this.recipe.made_for, "what": what}
        written = export_folder(this.exported_teacher(), this.last_unet(), target, **how)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.rglob("*.safetensors")))
    loads, works = this.derived.loads_in, this.derived.works_with
    return (
        {"bytes": size, "loads_in": loads, "works_with": works},
        f"{written}: {size / 1e6:,.1f} MB of weights\n"
        + "\n".join(f"  {program}: {answer}" for program, answer in loads.items()),
    )


def _for_openvino(this: "Run", target: Path, bits: Any, decoder: Path | None) -> tuple[dict[str, Any], str]:
    from prunet.exports.openvino import export_openvino
    from prunet.recipe.recipe import read_prompts
    from prunet.recipe.values import Drawing
    from prunet.runs.card import card_facts

    if not this.is_done("export"):
        this.do("export")
    recipe = this.recipe
    drawing = recipe.made_for or Drawing(**recipe.evaluation.model_dump(include=set(Drawing.model_fields)))
    prompts = read_prompts(recipe.evaluation.prompts)
    pipeline, card = this.folder / "pipeline", card_facts(this)
    facts = export_openvino(pipeline, target, prompts, drawing, bits=bits, decoder=decoder, card=card)
    return (
        facts,
        f"{target}: {facts['bytes'] / 1e6:,.1f} MB of models, {facts['seconds']:.2f} s a picture\n"
        f"  pictures compared with those of 16-bit weights in f32: PSNR {facts['psnr']:.1f} dB, root mean squared "
        f"error {facts['picture']:.4f}, over {facts['prompts']} prompts",
    )
