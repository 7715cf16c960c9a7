"""`benchmarks/gpu.py` runs: all of its sections, on small models and a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))


def start(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--out", out, "--device", "cpu", "--smoke", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.processes
def test_every_section_runs_to_its_end_and_no_check_fails(tmp_path: Path) -> None:
    from gpu import SECTIONS

    done = start(tmp_path, "--seconds", "1500")  # beside other tests
    assert done.returncode == 0, done.stdout + done.stderr
    for section in SECTIONS:
        said = json.loads((tmp_path / f"{section.name}.json").read_text())
        assert said["ended"] and said["results"], section.name
        assert said["torch"] in (tmp_path / "results.md").read_text()
    results = json.loads((tmp_path / "correctness.json").read_text())["results"]
    assert sum(result["ok"] is True for result in results) >= 15
    assert (tmp_path / "emoji-sheet.png").is_file()


@pytest.mark.processes
def test_a_section_that_runs_out_of_time_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    done = start(tmp_path, "--only", "memory", "emoji", "--seconds", "16")
    assert done.returncode == 1
    table = (tmp_path / "results.md").read_text()
    assert "stopped at its limit" in table and "| memory | (section)" in table and "| emoji | (section)" in table
