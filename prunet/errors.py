"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something that the user can mend: one line saying what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2; library users catch it by name.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
