"""Verbs for results: quality by a protocol, speed, and comparisons."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import ConfigOption, Json, app, drawing_asked, named_files, say, with_runtime
from prunet.errors import UserError


@app.command()
def protocols(as_json: Json = False) -> None:
    """List the protocols that come with prunet: what they draw, and what they measure."""
    from rich.console import Group
    from rich.table import Table

    from prunet.evaluation.protocol import load_protocol, protocol_names

    found = {name: load_protocol(name)[0] for name in protocol_names()}
    table = Table("protocol", "what it draws", "what it measures", box=None)
    for name, value in found.items():
        table.add_row(f"[bold]{name}[/]", value.description, ", ".join(value.metrics))
    note = "\nFor your own, or for the shipped emoji, give a YAML file, such as emoji/protocols/emoji-train.yaml"
    say(as_json, {name: value.model_dump(mode="json") for name, value in found.items()}, Group(table, note))


@app.command()
@with_runtime("device")
def measure(
    runtime: Any,
    model: Annotated[str, typer.Argument(help="Pipeline folder, .safetensors file, hub id, or run folder.")],
    protocol: Annotated[str, typer.Option(help="A protocol's name (see `prunet protocols`) or a YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures and numbers; for a run: RUN/measured/PROTOCOL."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="The protocol's prompts: .txt, .csv or .tsv.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="What prompts with {subject} are about: the rare word and the class, 'sks dog'.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Real pictures (folder), features prunet saved, or pytorch-fid's .npz.")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="The metrics' networks: inception=FILE, clip=PATH, dino=PATH.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Only the first N prompts, for a trial (KID uses smaller subsets).")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sampling steps, in place of the protocol's and the model's own."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "-g", min=0, help="In place of theirs; up to 1: no guidance.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="In place of theirs, such as dpmsolver++ or ddim-trailing.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 4,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Draw a protocol's prompts and measure the pictures: FID, KID, CLIP score and others, with intervals.

    The same command resumes. The numbers of a run also go into its report.

    Example: prunet measure runs/demo --protocol emoji/protocols/emoji-train.yaml

    In several processes: accelerate launch -m prunet measure MODEL --protocol NAME -o FOLDER
    """
    from prunet.evaluation.measures import markdown
    from prunet.evaluation.measuring import measure as measure_it
    from prunet.evaluation.protocol import ProtocolFiles, load_protocol, protocol_prompts
    from prunet.sampling.draw import Model

    chosen, beside = load_protocol(protocol)
    texts = protocol_prompts(chosen, beside, prompts, limit, subject)
    if limit:
        chosen = chosen.model_copy(update={"kid_subset_size": max(10, min(chosen.kid_subset_size, len(texts)))})
    is_run = (Path(model) / "recipe.yaml").is_file()
    if output is None and not is_run:
        raise UserError(f"{model}: not a run folder: give a folder for pictures and numbers with --output FOLDER")
    result = measure_it(
        Model(model, config, runtime.torch_device),
        chosen,
        texts,
        output or Path(model) / "measured" / chosen.name,
        files=ProtocolFiles(beside, real, named_files(weights, "inception=FILE, clip=PATH or dino=PATH")),
        drawing=drawing_asked(steps, guidance_scale, sampler),
        batch_size=batch_size,
    )
    if result:
        from rich.markdown import Markdown

        from prunet.report.run import write_report

        say(as_json, result.facts(), Markdown(markdown([result])))
        if output is None and (Path(model) / "report.html").is_file():
            write_report(model)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders of `prunet measure`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page, for run folders: comparison.html by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show several runs side by side on one page, or the numbers of several measured models in one table.

    Runs or numbers that were measured in different ways are refused, with the difference.
    """
    from prunet.disk.ownership import check_file
    from prunet.evaluation.measures import markdown
    from prunet.evaluation.measuring import compare as side_by_side
    from prunet.report.charts import is_page
    from prunet.report.comparison import write_comparison

    if any((folder / "measures.json").is_file() for folder in folders):
        from rich.markdown import Markdown

        if output is not None:
            raise UserError(f"--output {output}: only run folders give a page, measured models a table: leave it out")
        results = side_by_side(folders)
        say(as_json, {"results": [result.facts() for result in results]}, Markdown(markdown(results)))
        return
    output = output or Path("comparison.html")
    if output.suffix != ".html" or output.is_dir():
        raise UserError(f"--output {output}: not the name of a page: give NAME.html")
    check_file(output, "comparison", "--output", lambda path: is_page(path, "comparison"))
    page = write_comparison(folders, output)
    say(as_json, {"page": str(page)}, f"Page: {page}")


@app.command()
@with_runtime("device", "precision")
def bench(
    runtime: Any,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Pipeline folders (also for OpenVINO and ONNX), .safetensors files, hub ids or run folders; the first "
            "is the baseline."
        ),
    ],
    plans: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="Also time this plan's student of the baseline; repeatable."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, max=4096, help="Pixels; the baseline's own by default.")] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Pictures at once: 1; repeatable.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Sampling steps of a picture: 25, or as many as a model was made for."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=3, help="Calls of each part; the median counts. Slow parts get fewer, at least 3.")
    ] = 15,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time the denoisers with torch.compile (minutes each on a CPU).")
    ] = False,
    sd_cpp: Annotated[
        str | None,
        typer.Option("--sd-cpp", help="stable-diffusion.cpp's sd-cli, which draws with all MODELS that are files."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.md, bench.svg (the chart) and bench.json.")
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Time a teacher and its students side by side: text, denoiser, VAE, pictures a second, peak memory.

    All calls take turns, so a disturbance of the machine affects all of them. Beside a student's speed-up is its limit
    by multiply-adds (MACs): twice as fast for half the MACs. Where a student reaches less than 90 % of its limit, a
    table shows which operations take the rest of the time.

    Example: prunet bench my-model runs/mine --batch-size 1 --batch-size 4 -o runs/bench

    Before training: prunet bench my-model --plan bk-small --plan bk-tiny
    """
    from rich.markdown import Markdown

    from prunet.disk.files import check_writable
    from prunet.disk.ownership import check_place, hold
    from prunet.report.speeds import markdown, write_speeds
    from prunet.speed.bench import bench as time_all
    from prunet.speed.bench import check_compiler
    from prunet.speed.models import drawings, open_models, sources_of

    if output is not None:
        check_place(output, "bench", "--output", map(Path, models))
        check_writable(output, "--output")
    if sd_cpp and (batch_sizes or [1]) != [1]:
        raise UserError("--batch-size: stable-diffusion.cpp draws one picture at a time: leave it out, or --sd-cpp")
    if compiled:
        check_compiler(runtime.torch_device)
    where = {"device": runtime.torch_device, "dtype": runtime.dtype}
    opened = open_models(models, plans or (), size=size, config=config, sd_cpp=sd_cpp, **where)
    result = time_all(
        opened,
        size=size,
        batch_sizes=list(dict.fromkeys(batch_sizes or [1])),
        drawn=drawings(models, config=config, steps=steps, sd_cpp=sd_cpp),
        steps=steps or 25,
        repeats=repeats,
        compiled=compiled,
        sources=sources_of(models, config=config, sd_cpp=sd_cpp, **where),
    )
    if output is not None:
        with hold(output, "bench"):
            write_speeds(result, output)
    say(as_json, result.facts(), Markdown(markdown(result)))
