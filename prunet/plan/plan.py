"""The plan: the blocks to remove, as a value. `prunet.plan.derived` derives the rest from it and a teacher's config."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from prunet.disk.reading import load_yaml, parse_yaml
from prunet.errors import UserError
from prunet.hashing import json_hash

#: Characters of a pattern; the longest name of a part has 50.
LONGEST_PATTERN = 1000


@dataclass(frozen=True)
class Plan:
    """Patterns over diffusers' module names; modules that match are removed from the teacher's denoiser.

    `*`, `?` and `[...]` match within one dotted part of a name; `{a,b}` gives choices.
    `down_blocks.*.{resnets,attentions}.1` is the second resnet and attention of every down block.
    """

    name: str
    remove: tuple[str, ...] = ()
    description: str = ""
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the patterns, without name and description."""
        return json_hash(self.remove)


def preset_names() -> list[str]:
    """Returns the names of the plans that ship with prunet."""
    files = resources.files("prunet.plan") / "presets"
    return sorted(Path(f.name).stem for f in files.iterdir() if f.name.endswith(".yaml"))


def parse_plan(value: Any, where: str, name: str = "plan") -> Plan:
    """Makes a plan from parsed YAML: a mapping with `remove`, or a list of patterns."""
    if isinstance(value, list):
        value = {"remove": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: a plan must be a list of patterns or a mapping with 'remove', not {value!r}")
    fields = {f.name for f in dataclasses.fields(Plan)}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), sorted(fields), 1)
            raise UserError(
                f"{where}: unknown key {key!r} in a plan" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    remove = value.get("remove") or []
    if not isinstance(remove, list) or not all(isinstance(p, str) and p.strip() for p in remove):
        raise UserError(f"{where}: 'remove' must be a list of patterns, such as down_blocks.*.attentions.1: {remove!r}")
    if long := next((p for p in remove if len(p) > LONGEST_PATTERN), None):
        raise UserError(f"{where}: a pattern of {len(long):,} characters: {long!r}; give several shorter ones")
    texts = {"name": name, "description": "", "source": ""} | {k: v for k, v in value.items() if k != "remove"}
    if wrong := next(
        (k for k, v in texts.items() if isinstance(v, bool) or not isinstance(v, str | int | float)), None
    ):
        raise UserError(f"{where}: {wrong!r} of a plan must be a text, not {texts[wrong]!r}")
    return Plan(remove=tuple(p.strip() for p in remove), **{k: str(v) for k, v in texts.items()})


def load_plan(plan: "Plan | str | Path | list[str] | Mapping[str, Any]") -> Plan:
    """Loads a plan from a preset's name, a YAML file, a list of patterns or a mapping; a plan is returned as it is.

    Raises:
        UserError: there is no such preset or file, or it is not a plan.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, list | Mapping):
        return parse_plan(plan, "plan")
    text = str(plan)
    if text in preset_names():
        raw = (resources.files("prunet.plan") / "presets" / f"{text}.yaml").read_text(encoding="utf-8")
        return parse_plan(parse_yaml(raw, text), text, name=text)
    path = Path(text)
    if not path.is_file():
        near = difflib.get_close_matches(text, preset_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; presets: {', '.join(preset_names())}"
        raise UserError(f"No plan {text!r}: not a preset and not a file{hint}")
    return parse_plan(load_yaml(path, "a plan"), str(path), name=path.stem)
