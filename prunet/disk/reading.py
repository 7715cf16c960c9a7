"""Reads YAML and JSON that users write. Pages that are too large or too deep, and keys given twice, are refused.

Recipes, plans, protocols, values of `--set` and configs of parts are one page each. Ten lines of YAML can stand for a
billion values, by aliases of aliases, so the values are counted before any is made.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from prunet.errors import UserError

#: Bytes of a YAML page; PyYAML reads about 150 kB in a second.
LARGEST = 500_000
#: Values in one page; an alias counts as many as it stands for.
MOST = 50_000
#: Most lists and mappings inside one another.
DEEPEST = 20
#: Characters of a number or a date.
LONGEST_NUMBER = 60
#: Bytes of a JSON file (the largest index of shards has about 1 MB).
LARGEST_JSON = 10_000_000
#: One of the two halves (surrogates) in which UTF-16 writes some characters.
HALF = re.compile("[\ud800-\udfff]")
_TOO_MANY = f"more than {MOST:,} values, aliases counted; put long lists of prompts into a text file"
_TOO_DEEP = f"more than {DEEPEST} lists and mappings inside one another"
#: PyYAML raises its own errors, and Python's for a 13th month or `!!int abc`.
_BAD_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError)


class _Loader(yaml.SafeLoader):
    """Refuses pages that are too large, and keys given twice: the second would silently replace the first."""

    deep = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.deep += 1
        self.nodes += 1
        if self.nodes > MOST:
            raise yaml.composer.ComposerError(None, None, _TOO_MANY, self.peek_event().start_mark)
        if self.deep > DEEPEST:
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _extent(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, count in keys.items() if count > 1 and key != "<<"), None):
            raise _error(node, f"key {twice!r} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str):
            if HALF.search(text):  # JSON writes an emoji as two halves: "\ud83d\ude00"
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            _check_text(node, text)
        return text


def _error(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_text(node: Any, text: str) -> None:
    if not node.tag.endswith((":str", ":binary")) and len(text) > LONGEST_NUMBER:
        raise _error(node, f"a number or date of {len(text):,} characters")
    if "\0" in text:
        raise _error(node, f"a null character in {text!r}")
    if HALF.search(text):
        raise _error(node, f"half a character in {text!r}")


def _extent(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Returns how many values a node stands for, and how deep they are nested.

    `known`: the results by node. A node that is being counted has (0, 0), so that an alias to itself is refused.
    """
    if id(node) not in known:
        known[id(node)] = count, height = 0, 0
        items = () if isinstance(node, yaml.ScalarNode) else node.value
        for part in (part for item in items for part in (item if isinstance(item, tuple) else (item,))):
            more, deep = _extent(part, known)
            count, height = count + more, max(height, deep)
        if height >= DEEPEST:
            raise _error(node, _TOO_DEEP)
        if count >= MOST:
            raise _error(node, _TOO_MANY)
        known[id(node)] = count + 1, height + 1
    if known[id(node)] == (0, 0):
        raise _error(node, "an alias of a list or mapping that contains the alias")
    return known[id(node)]


def _unshared(value: Any) -> Any:
    """Replaces each alias by a copy, so that a change at one place (`--set`) does not change the other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def parse_yaml(text: str, where: str) -> Any:
    """Parses a YAML text.

    Raises:
        UserError: the text is not YAML, too large, too deep, or has a key twice; the message begins with `where`.
    """
    if len(text) > LARGEST:
        raise UserError(
            f"{where}: {len(text):,} characters, more than {LARGEST:,}: put long lists of prompts into a text file"
        )
    try:
        return _unshared(yaml.load(text, _Loader))
    except _BAD_YAML as error:
        raise UserError(f"{where}: not readable as YAML: {error}") from error


def load_yaml(path: Path, what: str) -> Any:
    """Reads a YAML file; a message calls its content `what` (`a recipe`).

    Raises:
        UserError: the file is missing, not readable, too large, too deep, or has a key twice.
    """
    if not path.is_file():
        raise UserError(f"No file at {path}: give {what} in YAML (docs/ has examples)")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    return parse_yaml(text, str(path))


def load_mapping(path: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file like `load_yaml`, and refuses any content but a mapping."""
    value = load_yaml(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not {what}: write a mapping of keys and values")
    return value


def check_permission(path: Path) -> None:
    """Refuses a file that this user may not read, because libraries call such a file missing or damaged.

    Other faults are left to the code that reads the file.

    Raises:
        UserError: this user may not read the file.
    """
    try:
        if path.is_file():  # opening a pipe would block
            path.open("rb").close()
    except PermissionError as error:
        raise UserError(
            f"{path}: no permission to read it: let this user read it (chmod), or run the command as its owner"
        ) from error
    except OSError:
        pass


def parse_json(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: the text is not JSON, too large or too deep.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON:,} characters")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deep") from error
