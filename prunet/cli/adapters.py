"""The verb for adapters of the teacher: LoRA, IP-Adapter, ControlNet."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import Json, app, say

#: Dropped layers that the text names; it counts the others.
NAMED = 3


@app.command()
def adapt(
    file: Annotated[Path, typer.Argument(help="LoRA or IP-Adapter (.safetensors), or a ControlNet's folder.")],
    to: Annotated[Path, typer.Option("--to", help="The student's run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new file or folder; FILE-RUN beside FILE by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a LoRA, an IP-Adapter or a ControlNet of the teacher for its student.

    Without conversion, an adapter changes the wrong layers of the student, usually without an error.

    Example: prunet adapt style.safetensors --to runs/demo
    """
    from prunet.adapters.adapt import adapt as carry_over

    facts = carry_over(file, to, output)
    whom = f"{facts['output']}: the {facts['kind']} for {facts['run']} ({facts['plan']})"
    text = _controlnet_text(facts) if facts["kind"] == "ControlNet" else _layers_text(facts)
    say(as_json, facts, whom + text)


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
