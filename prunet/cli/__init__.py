"""The command line. Each verb is one public function; `--json` makes the last line of stdout one JSON object."""

import errno
import gc
import inspect
import io
import os
import re
import signal
import sys
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from prunet import __version__, processes
from prunet.cli import (  # noqa: F401  (their verbs)
    adapters,
    exports,
    models,
    overviews,
    personal,
    play,
    recipes,
    results,
    searching,
)
from prunet.cli.options import app
from prunet.errors import UserError, is_out_of_memory, one_line

# Click's class, from a subclass of it, because typer has click in different places in different versions.
UsageError: Any = typer.BadParameter.__mro__[1]
#: Exit code of a command that was stopped by Ctrl-C; typer returns it instead of raising.
INTERRUPTED = 128 + signal.SIGINT
#: Signals that stop a command, sent by Ctrl-C, by a batch system or a service manager, and by a closed terminal.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: The verbs in the order of `prunet --help`, grouped by the user's aim.
PANELS = {
    "Begin": ("doctor", "inspect", "plans", "new", "search"),
    "Make a student": ("run", "estimate", "list", "watch", "cache", "distil", "evaluate", "ablate"),
    "Use it": ("generate", "play", "personalize", "adapt", "export", "decoder"),
    "Measure and compare": ("measure", "protocols", "bench", "compare"),
    "Files": ("build", "convert"),
}
#: Verbs that several processes may run together.
SHARED = ("run", "cache", "distil", "evaluate", "measure")


def _arrange() -> None:
    """Puts the verbs in the order of `PANELS`, and joins the lines of each paragraph of their help."""
    verbs: dict[str, Any] = {
        str(command.name or getattr(command.callback, "__name__", "")): command for command in app.registered_commands
    }
    app.registered_commands = []
    for panel, names in PANELS.items():
        for name in names:
            verb = verbs.pop(name)
            verb.rich_help_panel = panel
            verb.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(verb.callback) or "")  # rich keeps line ends
            app.registered_commands.append(verb)
    assert not verbs, f"not in PANELS: {', '.join(verbs)}"


_arrange()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"prunet {__version__}")
        raise typer.Exit
    if processes.count() > 1 and context.invoked_subcommand not in SHARED:
        raise UserError(
            f"prunet {context.invoked_subcommand}: runs in one process: start it without accelerate launch or "
            f"torchrun, which are for {', '.join(SHARED)}"
        )


def main() -> None:
    """Runs the command line; a `UserError` becomes one line on stderr and exit code 2."""
    _quiet()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its code
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _listen()
    try:
        code = _call()
    except BaseException:  # a library may have replaced the KeyboardInterrupt
        if not _stopped_by:
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        if processes.is_main():
            with suppress(OSError):  # the terminal may be gone
                print("Stopped; written files are kept, and the same command resumes from there.", file=sys.stderr)
        code = 128 + (_stopped_by or [signal.SIGINT])[-1]
    gc.freeze()  # else Python would look through all that was imported once more, for a second
    sys.exit(code)


def _call() -> int:
    try:
        code = app(
            [_at_home(argument) for argument in sys.argv[1:]] or ["--help"], prog_name="prunet", standalone_mode=False
        )
        if not code:
            processes.leave()
        return code or 0
    except UserError as error:
        _fail(str(error))
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "prunet"
        _fail(f"{error.format_message()} (see `{verb} --help`)")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"No space left ({error.filename or 'output'}): free some; finished files are kept")
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; give another path, or fix this one")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _fail(
                "Out of memory: do less at once (--micro-batch, --batch-size), use smaller pictures (data.size, "
                "--size), or distil with --gradient-checkpointing"
            )
        if processes.count() == 1 or not re.search("connection (closed|reset)|nccl|gloo", str(error), re.IGNORECASE):
            raise
        _fail("another process has ended; see its message")


def _at_home(argument: str) -> str:
    """Expands `~/`, since some shells do not expand it after `=`, and other programs never do."""
    option, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + sign + (os.path.expanduser(value) if value.startswith("~/") else value)


_stopped_by: list[int] = []  # received signals


def _listen() -> None:
    """Makes all signals that stop a command raise KeyboardInterrupt, as Ctrl-C does."""
    _stopped_by.clear()
    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup ignores SIGHUP
            signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    _stopped_by.append(number)
    raise KeyboardInterrupt


def _fail(message: str) -> NoReturn:
    if _stopped_by:
        raise KeyboardInterrupt
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"
    print(f"error{where}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def _quiet() -> None:
    """Hides warnings of libraries about things that prunet takes care of."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|diffusers|transformers|accelerate)")
