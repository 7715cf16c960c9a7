"""The one exception that a user is meant to read, and texts made safe for a terminal."""

import re

#: Characters that a terminal obeys instead of showing, that reverse the direction of a line, or that no encoding has.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: Characters of the longest message. Of a longer one the middle is left out, not what is wrong or how to fix it.
LONGEST = 800


def printable(text: str) -> str:
    r"""Returns `text` with the characters that a terminal would obey written out (`\x1b`); line ends and tabs stay."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode-escape").decode(), text)


def one_line(text: str) -> str:
    """Returns `text` as one printable line of at most about `LONGEST` characters, its middle left out if need be."""
    # Cut before it is split: a message may quote megabytes.
    line = " ".join(_cut(text, 100 * LONGEST).split())
    return _cut(printable(line), LONGEST)


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"


class UserError(Exception):
    """Something that the user can fix: one line saying what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2; library users catch it by name. The line is
    printable and of a readable length, whatever a message quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
