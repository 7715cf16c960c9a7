"""The command `prunet`. Imports take a moment, in which Ctrl-C just ends it; after that `prunet.cli` listens."""

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from prunet import cli

    cli.main()


if __name__ == "__main__":
    main()
