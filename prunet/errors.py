"""The one exception that a user is meant to read, and text that is safe to print."""

import re


class UserError(Exception):
    """Something that the user can mend: one line saying what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2; library users catch it by name.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


def printable(text: str) -> str:
    """The text with its control characters as escapes: a file's name could otherwise steer the terminal.

    Line ends and tabs stay.
    """
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), text)
