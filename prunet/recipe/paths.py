"""The paths in a recipe. They are relative to its folder; `~` and environment variables in them are expanded.

`from_folder` gives every text of a YAML page its folder. The types of path fields then join folder and text. Paths on
the command line (`--set`) are relative to the current folder.
"""

import os
import re
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SerializationInfo

from prunet.errors import UserError

#: Recipes and lists of prompts that come with prunet.
SHIPPED = Path(str(resources.files("prunet.recipe"))) / "shipped"
#: A text that may be a name instead of a path: owner/name on the hub, owner/name:split, or a layout.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


class _Text(str):
    """A text from a YAML page in `folder`."""

    folder: str


def from_folder(value: Any, folder: str) -> Any:
    """Returns a parsed YAML value in which every text knows its folder; "" is the current folder."""
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
    """Returns the parsed recipe of a run that was moved from folder `old` to `new`, with its paths adjusted.

    A path that no longer exists is replaced if it exists at the same place relative to the new folder.
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
    """Returns the path of the shipped file with this name, or else `path`."""
    return SHIPPED / f"{path}{ending}" if str(path) in shipped_names(ending) else Path(path)


def located(text: Any, may_be_id: bool = False) -> Any:
    """Returns a path of a recipe relative to the current folder; values that are not texts are returned unchanged.

    `may_be_id`: a name is returned unchanged if no file has this name.

    Raises:
        UserError: an environment variable is not set; or the path exists only relative to the current folder, as older
            versions read it.
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
            f"{text}: paths in a recipe are relative to its folder, {folder}, which has no {text}, but the current "
            f"folder has one: write {os.path.relpath(path, os.path.realpath(folder))}"
        )
    return path if may_be_id and _ID.fullmatch(path) and not _exists(there) else there


def in_full(source: str) -> str:
    """Returns an absolute path, which is valid wherever a recipe lies; a hub id is returned unchanged."""
    return str(Path(source).absolute()) if os.path.exists(source) else source


def _exists(path: str) -> bool:
    """Returns whether a path exists; for a pattern (`train-*.tar`, `{0000..0099}`), whether its folder exists."""
    plain = re.split(r"[*?\[{]", path)[0]
    return os.path.exists(path if plain == path else os.path.dirname(plain) or ".")


def _located_prompts(text: Any) -> Any:
    return str(text) if text in shipped_names(".txt") else located(text)


def _absolute(path: str, info: SerializationInfo) -> str:
    """Returns the absolute path if the serialization has a context; a name or hub id is returned unchanged."""
    is_name = "://" in path or path in shipped_names(".txt") or (_ID.fullmatch(path) and not _exists(path))
    return path if not info.context or is_name else os.path.abspath(path)


def _absolute_always(path: str, info: SerializationInfo) -> str:
    return os.path.abspath(path) if info.context else path


PathText = Annotated[str, BeforeValidator(located), PlainSerializer(_absolute_always)]
#: A path, a hub id or a layout.
PathOrId = Annotated[str, BeforeValidator(partial(located, may_be_id=True)), PlainSerializer(_absolute)]
#: A text file of prompts, or the name of a shipped list.
PromptsText = Annotated[str, BeforeValidator(_located_prompts), PlainSerializer(_absolute)]
