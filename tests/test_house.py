"""The code stays readable: short functions with few parameters, short files, a way into every folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import prunet

ROOT = Path(prunet.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Functions, files, and files beside the folders of the package.
LINES, LINES_OF_FILE, FILES_BESIDE = 80, 350, 10
PARAMETERS = 8


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Counts the parameters of a function, without `self` or `cls`."""
    args = node.args
    named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(args.vararg) + bool(args.kwarg)


def is_verb(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a verb of the command line, whose parameters are its options."""
    return any(ast.unparse(decorator).startswith("app.command") for decorator in node.decorator_list)


def test_functions_are_short_and_take_few_parameters() -> None:
    found = list(functions())
    assert len(found) > 1000  # the files were read
    long = [where for where, node in found if node.end_lineno - node.lineno >= LINES]
    assert not long, f"more than {LINES} lines: divide what they do"
    many = [where for where, node in found if parameters(node) > PARAMETERS and not is_verb(node)]
    assert not many, f"more than {PARAMETERS} parameters: give what belongs together a value"


def test_files_are_short_and_lie_in_rooms() -> None:
    long = [str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > LINES_OF_FILE]
    assert not long, f"more than {LINES_OF_FILE} lines: a file is one concept"
    beside = [path.name for path in ROOT.glob("*.py") if not path.name.startswith("__")]
    assert len(beside) <= FILES_BESIDE, "a new file belongs in a room"
