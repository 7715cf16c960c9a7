"""The exception with messages for users, and texts made safe for a terminal."""

import re

#: Control characters of a terminal, characters that reverse the direction of a line, and unpaired surrogates.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: Characters of the longest message. A longer message loses its middle, because its ends say what is wrong and how to
#: fix it.
LONGEST = 800


def printable(text: str) -> str:
    r"""Returns `text` with control characters written out (`\x1b`); line ends and tabs stay."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode-escape").decode(), text)


def one_line(text: str) -> str:
    """Returns `text` as one printable line; if it is longer than about `LONGEST` characters, its middle is left out."""
    # The text is cut before it is split, because a message may quote megabytes.
    line = " ".join(_cut(text, 100 * LONGEST).split())
    return _cut(printable(line), LONGEST)


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} [...] {text[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the machine or a device has no memory left."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error)


class UserError(Exception):
    """Something that the user can fix: one line saying what is wrong, where, and how to fix it.

    The command line prints the line without a traceback and exits with code 2; library users catch the exception by
    name. The line is printable and of a readable length, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class NotFinite(UserError):
    """Numbers that overflowed, or a training that diverged."""
