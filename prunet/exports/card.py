"""The model card of an exported student."""

import json
import re
from typing import Any

import jinja2

from prunet.errors import printable
from prunet.teacher.teacher import Teacher
from prunet.words import short


def origin(teacher: Teacher) -> dict[str, Any]:
    """What a model card says of where a student comes from; `base_model` only where the hub has it."""
    return {"teacher": teacher.hub_id or short(teacher.source), "base_model": teacher.hub_id}


def model_card(facts: dict[str, Any]) -> str:
    """The README of an exported pipeline, from plan, recipe, data, measures and licence.

    What a user wrote means itself alone there: it ends no YAML, no code, no table and no heading.
    """
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("prunet.exports", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"quoted": _quoted, "code": _code, "words": _words}
    return env.get_template("card.md.j2").render(**facts)


def _quoted(text: str) -> str:
    """A string of YAML and of Python in one line, whatever is in it."""
    # json.dumps leaves other line ends as they are, and would write an emoji as two halves.
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(text, ensure_ascii=False),
    )


def _code(text: str) -> str:
    """A span of Markdown code: one line between more backticks than it holds."""
    line = printable(" ".join(str(text).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _words(text: str) -> str:
    """Text of Markdown in one line: marks and HTML as characters."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", printable(" ".join(str(text).split())))
