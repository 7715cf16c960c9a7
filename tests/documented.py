"""The commands in the documentation: where they are, and whether the programs that they call know them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from typer.main import get_command

from prunet.cli import UsageError, app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "emoji/README.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "log.md")  # about older versions
)
PROGRAMS = ("prunet", "make", "pytest", "python", "pip", "accelerate", "torchrun")
#: What begins like a path of the repository has to be one.
FOLDERS = ("benchmarks/", "emoji/", "docs/", "tests/", "prunet/", ".venv/")
VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


class Command(NamedTuple):
    page: str
    text: str
    whole: bool  # a command in a block; otherwise a mention in a sentence, which may be only a part of a command

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text.partition(" > ")[0], comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
            words.pop(0)
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def commands(page: str) -> Iterator[Command]:
    """Yields the commands on a page, in blocks and in sentences."""
    text = (ROOT / page).read_text()
    fences = re.compile(r"^ *```(\w*).*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    blocks = [found[2] for found in fences.finditer(text) if found[1] in ("", "sh", "bash", "console")]
    text = fences.sub("", text)
    blocks += re.findall(r"(?:^ {4,}.*\n)+", text, re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r" && |; (?:do )?", re.sub(r"^\s*\$ ", "", line).strip()):
                yield from _command(page, part, True)
    for mention in re.findall(r"`([^`\n]+)`", text):
        yield from _command(page, mention, False)


def _command(page: str, text: str, whole: bool) -> Iterator[Command]:
    try:
        words = Command(page, text, whole).words
    except ValueError:  # an open quote: this is not a command
        return
    if len(words) > 1 and words[0] in PROGRAMS and words[1] not in ("is", "and", "of"):
        yield Command(page, text, whole)


def complaint(command: Command) -> str | None:
    """Returns why a command does not work as it is written."""
    words = command.words
    if "-m" in words and "prunet" in words[words.index("-m") :]:
        words = words[words.index("prunet", words.index("-m")) :]
    program, arguments = words[0], words[1:]
    if missing := [word for word in arguments if word.startswith(FOLDERS) and not _is_there(word)]:
        return f"there is no {missing[0]}"
    if program == "prunet":
        return _prunet(arguments, command.whole)
    if program == "make":
        return next((f"no target {word}" for word in arguments if "=" not in word and word not in TARGETS), None)
    if program == "python" and arguments[0].endswith(".py"):
        return _script(arguments)
    if program == "pip":
        extras = {extra for word in arguments for extra in re.findall(r"[\w,]+(?=\])", word)}
        return next(
            (f"no extra {extra}" for extra in ",".join(extras).split(",") if extra and extra not in EXTRAS), None
        )
    return None


def _is_there(word: str) -> bool:
    if re.search(r"[$*]", word):
        return bool(list(ROOT.glob(re.sub(r"\$\w+", "*", word))))
    return word.startswith(".venv/") or (ROOT / word.partition("::")[0]).exists()


def _prunet(arguments: list[str], whole: bool) -> str | None:
    verb, *rest = arguments
    if verb not in VERBS:
        return None if verb.startswith("-") or not verb.isalpha() or verb.isupper() else f"no verb {verb}"
    shortened = "..." in rest or not whole
    rest = ["1" if re.fullmatch("[A-Z]", word) else word for word in rest if word not in ("...", "...`")]
    try:
        VERBS[verb].make_context(verb, rest)
    except UsageError as error:
        if shortened and error.format_message().startswith("Missing"):
            return None
        return str(error.format_message())
    return None


def _script(arguments: list[str]) -> str | None:
    """Includes the options of scripts in the same folder that a script passes options to."""
    known = "".join(path.read_text() for path in (ROOT / arguments[0]).parent.glob("*.py"))
    options = [re.sub("^--no-", "--", word.partition("=")[0]) for word in arguments[1:] if word.startswith("--")]
    return next((f"no option {option}" for option in options if f'"{option}"' not in known), None)
