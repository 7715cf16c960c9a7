"""Lists of prompts from text, CSV and TSV files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from prunet.errors import UserError
from prunet.hashing import hash_of
from prunet.recipe.paths import shipped_names

#: Most characters of a prompt or caption. Text encoders read 77 tokens of fewer than 100 characters each.
LONGEST_PROMPT = 10_000
PROMPT_COLUMNS = ("text", "caption", "prompt", "prompts", "captions")


def read_prompt_file(path: Path) -> list[str]:
    """Reads a text file with one prompt per line (empty lines and `#` comments are skipped), or a column of a table.

    A table is a .csv or .tsv file with one of the columns `PROMPT_COLUMNS`.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, has no such column, or has a row without a prompt.
    """
    if not path.is_file():
        raise UserError(
            f"No prompt file at {path}: give a text file with one prompt per line, a .csv or .tsv, or the name of a "
            f"shipped list ({', '.join(shipped_names('.txt'))})"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from error
    if "\0" in text:
        raise UserError(f"{path}: contains a zero byte, so it is not a text file: give another")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _column(path, text, tabs=kind == ".tsv")
    # Not str.splitlines, which also splits at characters that a prompt may contain.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path}: contains no prompt: write one per line")
    check_prompts(prompts, str(path))
    return prompts


def check_prompts(prompts: Sequence[str], where: str) -> None:
    """Refuses prompts that are too long or not text; `where` begins the message.

    Raises:
        UserError: a prompt is too long or not text (the first such prompt).
    """
    for prompt in prompts:
        if len(prompt) > LONGEST_PROMPT:
            raise UserError(
                f"{where}: a prompt of {len(prompt):,} characters ({prompt[:40]!r}...), more than {LONGEST_PROMPT:,}: "
                "shorten it, or give one prompt per line"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"{where}: {prompt!r} is not UTF-8 text: save it as UTF-8")


def _column(path: Path, text: str, *, tabs: bool) -> list[str]:
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), **how))
    except csv.Error as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:].upper()}: {error}") from error
    if not rows:
        raise UserError(f"{path}: contains no prompt: write one per line")
    column = next((name for name in rows[0] if name and name.strip().lower() in PROMPT_COLUMNS), None)
    if column is None:
        found = ", ".join(str(name) for name in rows[0])
        raise UserError(f"{path}: no column of prompts ({', '.join(PROMPT_COLUMNS)}) among {found[:200]}")
    prompts = [(row[column] or "").strip() for row in rows]
    if "" in prompts:
        raise UserError(f"{path}: row {prompts.index('') + 1} has no prompt")
    check_prompts(prompts, str(path))
    return prompts


def prompts_hash(prompts: Sequence[str]) -> str:
    """Returns a SHA-256 of prompts in their order."""
    return hash_of(["\n".join(prompts).encode()])
