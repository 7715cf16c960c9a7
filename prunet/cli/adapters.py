"""The verb for adapters of the teacher: LoRA, IP-Adapter, ControlNet."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import ConfigOption, Json, app, say
from prunet.errors import UserError

#: Dropped layers that the text names; it counts the others.
NAMED = 3


@app.command()
def adapt(
    file: Annotated[Path, typer.Argument(help="LoRA or IP-Adapter (.safetensors), or a ControlNet's folder.")],
    to: Annotated[Path | None, typer.Option("--to", help="The student's run folder.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Without a run folder: the teacher, as in `prunet inspect` (also a layout: sd-v1, sdxl)."),
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", "-p", help="Without a run folder: the plan; a preset's name or a YAML file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The new file or folder; FILE-RUN (or FILE-PLAN) beside FILE by default."),
    ] = None,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Convert a LoRA, an IP-Adapter or a ControlNet of the teacher for its student.

    Without conversion, an adapter changes the wrong layers of the student, usually without an error.

    Example: prunet adapt style.safetensors --to runs/demo

    For a student without its run folder: prunet adapt style.safetensors --teacher sdxl --plan ssd-1b
    """
    from prunet.adapters.adapt import adapt as carry_over
    from prunet.plan.derived import derive
    from prunet.plan.plan import load_plan
    from prunet.teacher.teacher import Teacher

    if to is not None and (teacher, plan, config) == (None, None, None):
        facts = carry_over(file, to, output)
        whom = f"{facts['run']} ({facts['plan']})"
    elif to is None and teacher is not None and plan is not None:
        chosen = load_plan(plan)
        opened = Teacher(teacher, config=config, only_form=True)
        facts = carry_over(file, derive(opened.unet_config, chosen), output)
        whom = f"students of {teacher} by {facts['plan']}"
    else:
        raise UserError("give either --to RUN, or both --teacher and --plan")
    text = _controlnet_text(facts) if facts["kind"] == "ControlNet" else _layers_text(facts)
    say(as_json, facts, f"{facts['output']}: the {facts['kind']} for {whom}{text}")


def _layers_text(facts: dict[str, list[str]]) -> str:
    kept, dropped = facts["kept"], facts["dropped"]
    text = f", {len(kept):,} of {len(kept) + len(dropped):,} layers"
    if dropped:
        more = f" and {len(dropped) - NAMED:,} more" if len(dropped) > NAMED else ""
        text += f"\ndropped, because their blocks are removed: {', '.join(dropped[:NAMED])}{more}"
    return text


def _controlnet_text(facts: dict[str, Any]) -> str:
    if facts["form"] == "whole":
        return ", whole; load it with student_controlnet.py in that folder, which leaves out or adds up its residuals"
    hint = "; the original also fits this student" if facts["fits_unchanged"] else ""
    return f", cut to the student's form and not trained after that{hint}"
