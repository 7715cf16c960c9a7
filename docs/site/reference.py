"""Pages of the reference, made from the code: keys of YAML files, verbs of the command line, names of the package."""

import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

import prunet
from prunet.cli import app
from prunet.evaluation.protocol import Protocol
from prunet.recipe.recipe import Recipe
from prunet.recipe.stage import PlanValue, TeacherValue
from prunet.runs.ablation import Ablation

BOUNDLESS = 1_000_000_000  # bounds from here on only keep numbers small enough for a computer


def recipe_page() -> str:
    """Every key of a recipe, and of the other YAML files, with type, default and description."""
    parts = [
        "# Every key of a recipe",
        "What a key means, made from the code. [Recipes](../recipes.md) explains how they belong together; the command "
        "line sets any of them: `--set stages.0.steps=100`. In the list of stages the first one has the number 0.",
        *_sections(Recipe, "A recipe"),
        *_sections(Protocol, "A protocol (`prunet measure`)"),
        *_sections(Ablation, "An ablation (`prunet ablate`)"),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(model: type[BaseModel], title: str) -> list[str]:
    parts = [f"## {title}"]
    queue = [("", model)]
    while queue:
        prefix, part = queue.pop(0)
        if prefix:
            parts.append(f"### `{prefix.removesuffix('.')}`")
        parts.append(_inline((part.__doc__ or "").partition("\n")[0]))
        hints = typing.get_type_hints(part, include_extras=True)
        rows = [_row(prefix + key, field, _type(hints[key])) for key, field in part.model_fields.items()]
        parts.append("\n".join(["| key | |", "|---|---|", *rows]))
        for key in part.model_fields:
            for inside, is_list in _parts(hints[key]):
                if (prefix, key) != ("stages.N.", "teacher"):  # as the recipe's own
                    queue.append((f"{prefix}{key}.{'N.' if is_list else ''}", inside))
    return parts


def _parts(hint: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The parts in a type, each with whether it is in a list."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint, is_list
    for inside in typing.get_args(hint):
        yield from _parts(inside, is_list or typing.get_origin(hint) is list)


def _row(key: str, field: FieldInfo, kind: str) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        kind += "; **required**"
    elif not isinstance(default, BaseModel):
        kind += f"; default `{_yaml(default)}`"
    return f"| `{key}` | {_inline(field.description or '')}<br><small>{kind}</small> |"


def _yaml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value or '""' if isinstance(value, str) else json.dumps(value)


def _type(hint: Any) -> str:
    """A type in words."""
    inside = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if hint == PlanValue:
        return "text, list of patterns, or mapping"
    if hint == TeacherValue:
        return "text, or mapping (see below)"
    if origin is typing.Annotated:
        return f"{_type(inside[0])}{_bounds(inside[1:])}"
    if origin in (typing.Union, types.UnionType):
        *most, last = (_type(one) for one in inside)
        return f"{', '.join(most)} or {last}"
    if origin is typing.Literal:
        return " or ".join(f"`{one}`" for one in inside)
    if origin is tuple:
        return f"list of {len(inside)}: {_type(inside[0])}"
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is dict:
        return f"mapping of names to {_type(inside[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "mapping (see below)"
    words = {str: "text", bool: "true or false", int: "integer", float: "number", types.NoneType: "null", Any: "value"}
    return words[hint]


def _bounds(annotations: Sequence[Any]) -> str:
    """The bounds in what follows the type of an `Annotated`."""
    bounds = [bound for field in annotations if isinstance(field, FieldInfo) for bound in field.metadata]
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    ends = [
        f"{word} {limit:g}"
        for name, word in words.items()
        for bound in bounds
        if (limit := getattr(bound, name, None)) is not None and limit < BOUNDLESS
    ]
    return f" {' '.join(ends)}" if ends else ""


def cli_page() -> str:
    """Every verb of the command line with its arguments and options."""
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    parts = [
        "# The command line",
        "What `prunet VERB --help` says, made from the code. Options that read `--name VALUE` may also be written "
        "`--name=VALUE`. The exit code is 0, 2 (one line says what does not fit), or 128 and the signal's number.",
        "\n".join(
            ["| verb | |", "|---|---|", *(f"| [`{name}`](#{name}) | {_brief(verb)} |" for name, verb in verbs.items())]
        ),
    ]
    for name, verb in verbs.items():
        context = verb.make_context(f"prunet {name}", [], resilient_parsing=True)
        given = [p for p in verb.params if p.name != "help"]
        arguments = [p.name.upper() for p in given if p.param_type_name == "argument"]
        parts += [f"## {name}", _prose(verb.help), f"    prunet {' '.join([name, *arguments])} [OPTIONS]"]
        parts.append("\n".join(["| | |", "|---|---|", *(_parameter(p, context) for p in given)]))
    return "\n\n".join(parts) + "\n"


def _brief(verb: Any) -> str:
    return _inline(verb.help.partition("\n\n")[0])


def _parameter(parameter: Any, context: Any) -> str:
    names, text = parameter.get_help_record(context)
    if parameter.param_type_name == "argument":
        names = parameter.name.upper()
    return f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {_inline(text)} |"


def _prose(text: str) -> str:
    return re.sub(r"\[/?(bold|italic)?\]", "", text)


def _inline(text: str) -> str:
    """Text for one cell of a table; pages that it names become links."""
    text = _prose(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text)


def api_page() -> str:
    """Every public name, by its docstring (mkdocstrings reads it)."""
    parts = [
        "# The Python package",
        "What `import prunet` offers: one function for every step of the command line, and the values between them. "
        "Everything else may change without notice.",
        '```python\nimport prunet\n\nprunet.run(prunet.load_recipe("mine.yaml"))  # as `prunet run mine.yaml`\n```',
        *(f"::: prunet.{name}" for name in prunet.__all__ if name != "__version__"),
    ]
    return "\n\n".join(parts) + "\n"
