"""The paths in a recipe: they begin at its folder, and `~` and environment variables stand for what they say.

A YAML page is read as texts that know their folder (`from_folder`), so that the types of the fields, which know what is
a path, can join the two. Values of the command line (`--set`) begin at the current folder.
"""

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SerializationInfo

from prunet.errors import UserError

#: Recipes and lists of prompts that come with prunet.
SHIPPED = Path(str(resources.files("prunet.recipe"))) / "shipped"
#: What may also be the name of something elsewhere: owner/name of the hub, owner/name:split, or a layout.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


class _Text(str):
    """A text of a YAML page in `folder`."""

    folder: str


def from_folder(value: Any, folder: str) -> Any:
    """Returns a parsed YAML value in which every text knows its folder; "" is the current one."""
    if isinstance(value, dict):
        return {key: from_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [from_folder(item, folder) for item in value]
    if not isinstance(value, str) or isinstance(value, _Text):
        return value
    text = _Text(value)
    text.folder = folder
    return text


def moved(value: Any, old: str, new: str) -> Any:
    """Returns a parsed run's recipe whose paths follow the run from folder `old` to `new`.

    A path that is not there any more is taken to have moved along, if it is there as seen from the new folder.
    """
    if isinstance(value, dict):
        return {key: moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, old, new) for item in value]
    if not isinstance(value, str) or not os.path.isabs(value) or _exists(value):
        return value
    along = os.path.normpath(os.path.join(os.path.abspath(new), os.path.relpath(value, old)))
    return along if _exists(along) else value


def shipped_names(ending: str) -> list[str]:
    """Returns the names of the shipped recipes (`.yaml`) or lists of prompts (`.txt`)."""
    return sorted(path.stem for path in SHIPPED.glob(f"*{ending}"))


def shipped_or(path: str | Path, ending: str) -> Path:
    """Returns the path of the shipped file of that name, or else `path`."""
    return SHIPPED / f"{path}{ending}" if str(path) in shipped_names(ending) else Path(path)


def located(text: Any, may_be_id: bool = False) -> Any:
    """Returns a path of a recipe as the current folder sees it; what is no text is left to the type's own check.

    `may_be_id`: a name without such a file is left as it is.

    Raises:
        UserError: an environment variable is not set; or nothing is there, but in the current folder, where the paths
            of a recipe used to begin.
    """
    if not isinstance(text, str):
        return text
    folder, path = getattr(text, "folder", ""), os.path.expanduser(os.path.expandvars(text))
    if (unset := re.search(r"\$(\w+|\{\w+\})", path)) and not os.path.exists(path):
        raise UserError(f"{text}: the environment variable {unset[0]} is not set: set it, or write the path out")
    there = os.path.join(folder, path)
    if "://" in path:  # a URL
        return path
    if folder in ("", ".") or path == "" or os.path.isabs(path):
        return path
    if not _exists(there) and _exists(path):
        raise UserError(
            f"{text}: paths in a recipe begin at its folder, {folder}, where no {text} is, but in the current folder "
            f"is one: write {os.path.relpath(path, os.path.realpath(folder))}"
        )
    return path if may_be_id and _ID.fullmatch(path) and not _exists(there) else there


def _exists(path: str) -> bool:
    """Whether a path is there; of a pattern (`train-*.tar`, `{0000..0099}`), the folder before it."""
    plain = re.split(r"[*?\[{]", path)[0]
    return os.path.exists(path if plain == path else os.path.dirname(plain) or ".")


def _located_or_id(text: Any) -> Any:
    return located(text, may_be_id=True)


def _located_prompts(text: Any) -> Any:
    return str(text) if text in shipped_names(".txt") else located(text)


def _absolute(path: str, info: SerializationInfo) -> str:
    """Writes a path in full where the context asks for it; a name or hub id stays."""
    is_name = "://" in path or path in shipped_names(".txt") or (_ID.fullmatch(path) and not _exists(path))
    return path if not info.context or is_name else os.path.abspath(path)


def _absolute_always(path: str, info: SerializationInfo) -> str:
    return os.path.abspath(path) if info.context else path


PathText = Annotated[str, BeforeValidator(located), PlainSerializer(_absolute_always)]
#: A path, a hub id or a layout.
PathOrId = Annotated[str, BeforeValidator(_located_or_id), PlainSerializer(_absolute)]
#: A text file of prompts, or the name of a shipped list.
PromptsText = Annotated[str, BeforeValidator(_located_prompts), PlainSerializer(_absolute)]
