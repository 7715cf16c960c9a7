"""The public names: each is documented, and so are all classes in their annotations."""

import inspect
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import prunet

NAMES = [name for name in prunet.__all__ if name != "__version__"]


def named(annotation: Any) -> Iterator[type]:
    """Returns the classes in an annotation."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for inside in typing.get_args(annotation):
        yield from named(inside)


def test_one_version() -> None:
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    assert project["version"] == cited["version"] == prunet.__version__


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented_with_all_that_it_takes_and_gives(name: str) -> None:
    value = getattr(prunet, name)
    assert value.__doc__, f"prunet.{name} has no docstring"
    function = value.__init__ if inspect.isclass(value) else value
    ours = {
        cls.__name__
        for annotation in typing.get_type_hints(function).values()
        for cls in named(annotation)
        if cls.__module__.startswith("prunet.")
    }
    assert ours <= set(prunet.__all__), f"prunet.{name} takes or gives what has no public name"
