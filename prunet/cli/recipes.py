"""Verbs that run a recipe: all of it, up to some step, or in several variants."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prunet import processes
from prunet.cli.options import (
    COUNTED,
    LOOP,
    ConfigOption,
    Json,
    RecipeArgument,
    SetOption,
    app,
    named_files,
    open_recipe,
    say,
    with_runtime,
)


def _run_until(until: str, path: Path, overrides: list[str] | None, runtime: Any, as_json: bool) -> Any:
    from prunet.evaluation.results import read_evaluation
    from prunet.runs.run import Run

    this = Run(open_recipe(path, overrides), runtime)
    this.check(until)
    this.finish(until)
    facts = {
        "output": str(this.folder),
        "steps": {n: "done" if this.is_done(n) else "not needed" for n in this.step_names(until)},
    }
    if until == "report":
        facts["evaluation"] = read_evaluation(this.folder / "evaluation").facts()["distance"]
        facts["report"] = str(this.folder / "report.html")
    say(as_json, facts, _where(this.folder, until))
    return this


def _where(folder: Path, until: str) -> str:
    if until != "report":
        return str(folder)
    return f"Report: {folder / 'report.html'}\nPipeline: {folder / 'pipeline'}"


@app.command()
@with_runtime("device", "precision")
def new(
    runtime: Any,
    plan: Annotated[
        str | None, typer.Argument(help="A preset of `prunet plans`; bk-small or ssd-1b by default.")
    ] = None,
    teacher: Annotated[str, typer.Option(help="diffusers folder, .safetensors file or hub id.")] = ...,  # type: ignore[assignment]
    data: Annotated[
        str, typer.Option(help="Pictures with captions (docs/recipes.md), or a text file of prompts.")
    ] = ...,  # type: ignore[assignment]
    budget: Annotated[str | None, typer.Option(help="Memory of the GPU that will train it, such as 24GB.")] = None,
    jumps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps in which the student draws, without guidance; 4 is usual. By default it draws like the "
            "teacher, with guidance.",
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Print a commented recipe that fits a model, its data and the memory of a device.

    Example: prunet new bk-tiny --teacher model.safetensors --data pictures --budget 24GB > mine.yaml
    """
    from dataclasses import replace

    from prunet.runs.new import new_recipe, parse_budget

    if budget and runtime.device is None and runtime.torch_device.type == "cpu":  # a GPU of another machine
        runtime = replace(runtime, device="cuda", precision="bf16")
    text = new_recipe(
        teacher,
        data,
        plan=plan,
        config=config,
        jumps=jumps,
        budget=parse_budget(budget) if budget else None,
        runtime=runtime,
    )
    say(as_json, {"recipe": text}, text.rstrip("\n"))


@app.command()
@with_runtime(*LOOP)
def run(
    runtime: Any,
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: plan, cache, build, distil, evaluate, export, report.

    Finished steps are skipped, so the same command resumes a run that was stopped.
    """
    _run_until("report", recipe, overrides, runtime, as_json)


@app.command()
@with_runtime(*COUNTED)
def estimate(
    runtime: Any,
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Json = False,
) -> None:
    """Show the steps of a recipe, and estimate its peak memory by part and its hours on this device.

    Memory is computed from shapes, hours from a few steps of the real loop with random weights. Nothing is written.
    """
    from prunet.cli.views import estimate_view
    from prunet.runs.estimate import estimate as cost_of
    from prunet.runs.run import Run

    this = Run(open_recipe(recipe, overrides), runtime)
    this.check()
    cost = cost_of(this)
    say(as_json, asdict(cost), estimate_view(this, cost))


@app.command()
@with_runtime("device", "precision")
def cache(
    runtime: Any,
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to its cache: encode pictures and captions, or let the teacher draw the prompts."""
    _run_until("cache", recipe, overrides, runtime, as_json)


@app.command()
@with_runtime(*LOOP)
def distil(
    runtime: Any,
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to the distilled student; resumes from the last checkpoint."""
    _run_until("distil", recipe, overrides, runtime, as_json)


@app.command()
@with_runtime("device", "precision")
def evaluate(
    runtime: Any,
    recipe: RecipeArgument,
    overrides: SetOption = None,
    weights: Annotated[list[str] | None, typer.Option(help="vgg=FILE and lpips=FILE: also measure LPIPS.")] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to its evaluation: sizes, speeds, and distance from the teacher before and after distillation.

    With --weights, LPIPS is measured too; a finished run gets it added.

    Example: prunet evaluate RUN --weights vgg=FILE --weights lpips=FILE
    """
    from prunet.evaluation.lpips import Lpips, add_lpips
    from prunet.evaluation.results import markdown, read_evaluation
    from prunet.report.run import write_report

    files = named_files(weights, "vgg=FILE and lpips=FILE")
    lpips = Lpips.load(files, runtime.torch_device) if files else None
    this = _run_until("evaluate", recipe, overrides, runtime, as_json)
    if lpips and processes.is_main():
        with this.at_work():
            add_lpips(this.folder / "evaluation", lpips)
            if this.is_done("report"):
                write_report(this.folder)
    if not as_json:
        from rich.markdown import Markdown

        say(as_json, {}, Markdown(markdown(read_evaluation(this.folder / "evaluation"))))


@app.command()
@with_runtime("device", "precision", "micro_batch")
def ablate(
    runtime: Any,
    ablation: Annotated[Path, typer.Argument(help="A YAML file: recipe, seeds and arms (see benchmarks/).")],
    overrides: SetOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time: one per GPU, or sharing the CPU.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a recipe in several variants with several seeds each, and write one table with intervals.

    Finished runs are skipped, so the same command resumes where it was stopped.
    """
    from prunet.runs.ablation import ablate as do_all
    from prunet.runs.ablation import load_ablation
    from prunet.runs.ablation_table import markdown

    chosen, recipes = load_ablation(ablation, overrides or ())
    result = do_all(chosen, recipes, runtime, workers=workers)
    from rich.markdown import Markdown

    say(as_json, result.facts(), Markdown(markdown(result)))
