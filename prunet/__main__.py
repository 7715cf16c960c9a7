"""The command `prunet`. Ctrl-C simply ends it during the imports; after that `prunet.cli` handles Ctrl-C."""

import signal


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from prunet import cli

    cli.main()


if __name__ == "__main__":
    main()
