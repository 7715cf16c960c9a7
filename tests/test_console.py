"""Messages and progress while a command works: on stderr, unchanged, and as lines where no bar can be drawn."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prunet import console
from prunet.console import progress, say


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The console's clock, which the test moves."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_messages_go_to_stderr_in_one_line(capsys) -> None:
    say("[bold]a[/] " + "long " * 100)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "a " + "long " * 100 + "\n"


def test_without_a_terminal_progress_is_a_line_a_minute(clock, capsys) -> None:
    with progress("Working", 20) as bar:
        for i in range(20):
            clock.s += 25
            bar.advance(1, note=f"at {i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  Working: 3 of 20, 0:07:05 left  at 2"  # 75 s for 3, so 425 s for 17
    assert [line.split()[1] for line in lines] == ["3", "6", "9", "12", "15", "18"]


def test_work_done_before_does_not_count_for_the_pace(clock, capsys) -> None:
    with progress("Working", 100) as bar:
        bar.advance(90)
        for _ in range(3):
            clock.s += 30
            bar.advance()
    assert capsys.readouterr().err == "  Working: 93 of 100, 0:03:30 left  \n"  # 30 s each


def test_work_without_a_known_end_shows_its_count(clock, capsys) -> None:
    with progress("Reading", None) as bar:
        clock.s += 61
        bar.advance(5, note="a")
        clock.s += 61
        bar.advance(5)  # the note stays
    assert capsys.readouterr().err == "  Reading: 5  a\n  Reading: 10  a\n"


def test_names_are_not_read_as_markup(clock, capsys) -> None:
    with progress("[/a] [bold]", 2) as bar:
        clock.s += 61
        bar.advance(1, note="[red]x")
    assert capsys.readouterr().err.startswith("  [/a] [bold]: 1 of 2, ")


def test_work_without_a_name_shows_nothing(clock, capsys) -> None:
    with progress("", None) as bar:
        clock.s += 1000
        bar.advance(1)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_the_note_and_not_the_count_or_the_time(width, monkeypatch) -> None:
    shown = io.StringIO()
    terminal = console._Printable(file=shown, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    with progress("Distilling stage 1", 240) as bar:
        bar.advance(120, note="loss 0.1234  task 0.1234  output 0.0123  feature 0.5432  12.3 images/s")
    last = shown.getvalue().strip().splitlines()[-2 if shown.getvalue().strip().endswith("h") else -1]
    assert "Distilling stage 1" in last and "120/240" in last and re.search(r"\d:\d\d:\d\d < +[-\d]:", last)
    assert ("loss 0.1234" if width > 60 else "…") in last and len(last.split("\r")[-1].replace("\x1b[2K", "")) <= width


@pytest.mark.processes
def test_a_library_user_sees_no_warning_of_other_libraries(sd, tmp_path) -> None:
    """In a new process, because some libraries warn when they are first imported."""
    code = f"""
import warnings
warnings.simplefilter("always", FutureWarning)
from prunet import Drawing, Teacher, build, export, generate, load_plan
teacher = Teacher({str(sd)!r})
student = build(teacher, load_plan("bk-small"))
teacher.encode_prompts(["long " * 200])
export(teacher, student, {str(tmp_path / "out")!r})
generate({str(tmp_path / "out")!r}, "a cat", drawing=Drawing(steps=1))
import transformers
assert transformers.logging.get_verbosity() == transformers.logging.WARNING, "as it was"
"""
    # Without the settings that the command line has made in this process.
    env = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY") and "TQDM" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stderr + done.stdout == ""
