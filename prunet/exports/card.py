"""The model card of an exported student."""

import json
import re
import shlex
from typing import Any

import jinja2

from prunet.errors import printable
from prunet.teacher.teacher import Teacher
from prunet.words import short


def origin(teacher: Teacher, *later: Teacher) -> dict[str, Any]:
    """Returns the facts of a model card about the teacher, and about `later` ones of single stages.

    `base_model`: the one on the hub, or a list of several, or None; `also`: the names of others than the first; `last`:
    the name of the last one, whose VAE and text encoders the student has.
    """
    named = [one.hub_id or short(one.source) for one in (teacher, *later)]
    names = list(dict.fromkeys(named))
    hub = list(dict.fromkeys(one.hub_id for one in (teacher, *later) if one.hub_id))
    base = hub if len(hub) > 1 else hub[0] if hub else None
    commit = teacher.commit if teacher.hub_id else None
    return {"teacher": names[0], "also": names[1:], "last": named[-1], "base_model": base, "commit": commit}


def model_card(facts: dict[str, Any]) -> str:
    """Renders the README of an exported pipeline from its plan, recipe, data, measures and licence.

    `facts` may name another `template` of this folder, which is rendered from the other facts.

    Texts of the user are escaped, so they cannot end the YAML, a code span, a table or a heading.
    """
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("prunet.exports", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"quoted": _quoted, "code": _code, "words": _words, "shell": _shell}
    return env.get_template(facts.get("template", "card.md.j2")).render(**facts)


def _quoted(text: str | list[str]) -> str:
    """Quotes any text, or a list of texts, as one line that both YAML and Python read."""
    # json.dumps leaves other line ends as they are, and with ensure_ascii would write an emoji as two halves.
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(text, ensure_ascii=False),
    )


def _shell(text: str) -> str:
    """Quotes a text as one argument of a shell's command, on one line."""
    return shlex.quote(printable(" ".join(str(text).split())))


def _code(text: str) -> str:
    """Formats a text as a Markdown code span: one line between more backticks than it holds."""
    line = printable(" ".join(str(text).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _words(text: str) -> str:
    """Formats a text as one line of Markdown, with marks and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", printable(" ".join(str(text).split())))
