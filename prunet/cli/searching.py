"""The verb that finds a plan for a budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import CacheOption, CompareOption, ConfigOption, Json, PromptsOption, app, say, with_runtime
from prunet.errors import UserError


@app.command()
@with_runtime("device", "precision", "micro_batch")
def search(
    runtime: Any,
    model: Annotated[str, typer.Argument(help="The teacher: diffusers folder, .safetensors file or hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan, a page, a recipe and the state.")
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "-b", help="Such as parameters=50%, macs=60%, latency=40% or size=1GB; give at least one."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="Instead of a budget, a plan: its form, with the blocks to keep chosen for this teacher."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="A pattern of parts that must stay; repeatable.")
    ] = None,
    prompts: PromptsOption = None,
    cache: CacheOption = None,
    recover: Annotated[
        int,
        typer.Option(min=0, help="Distil the best plans for this many steps on --cache; choose by the error after it."),
    ] = 0,
    guidance_scale: CompareOption = 7.5,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Find the plan with the least error within a budget.

    Scores the removal of every unit alone, then the best sets of units as a whole. With --recover it also distils the
    best sets for some steps. A budget is a share of the teacher's cost, or an amount. Size means the denoiser in half
    precision; latency is timed on this device. With --form vega the student loads in all programs that load vega, such
    as ComfyUI. The same command resumes.

    Example: prunet search my-model --budget macs=60% -o runs/search, then prunet run runs/search/recipe.yaml

    For ComfyUI: prunet search my-sdxl --form vega -o runs/search
    """
    from prunet.cli.views import search_view
    from prunet.disk.files import check_writable
    from prunet.disk.ownership import check_place, hold
    from prunet.plan.plan import load_plan
    from prunet.recipe.prompts import read_prompt_file
    from prunet.report.search import write_search
    from prunet.search.budgets import parse_budgets
    from prunet.search.outcome import write_plan
    from prunet.search.recovery import check_micro_batch
    from prunet.search.search import find_plan
    from prunet.search.sensitivity import check_samples
    from prunet.search.space import Space
    from prunet.teacher.teacher import Teacher

    if form and budget:
        raise UserError("--form, --budget: a form says what the student costs: leave one of them out")
    budgets = [] if form else parse_budgets(budget or [])
    check_place(output, "search", "--output", [Path(model), *([cache] if cache else [])])
    check_writable(output, "--output")
    texts = read_prompt_file(prompts) if prompts else None
    teacher = Teacher(model, config=config, device=runtime.torch_device, dtype=runtime.dtype, only_form=True)
    if recover and cache is None:
        raise UserError("--recover: needs samples for training: give a run or a cache with --cache")
    check_micro_batch(runtime.micro_batch if recover else None)
    check_samples(teacher, None if recover else texts, cache, guidance_scale)
    teacher.check_weights()
    space = Space(teacher, budgets, keep or [], load_plan(form) if form else None)
    with hold(output, "search"):
        given: dict[str, Any] = {"prompts": texts, "cache": cache, "guidance_scale": guidance_scale}
        plan, result = find_plan(space, output, runtime, recover_steps=recover, **given)
        write_plan(plan, result, output, cache=cache, prompts=prompts, config=config)
        write_search(result, output)
    facts = result.model_dump(include={"budgets", "costs", "plans", "presets"}) | {"output": str(output)}
    say(as_json, facts, None if as_json else search_view(result, output))
