"""Models of the published sizes with random weights: minutes, and many GB. `make test-slow` runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "full_size.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("sd-v1", "bk-small", "--size", "512", "--steps", "2"),
        ("sdxl", "vega", "--size", "512", "--steps", "1", "--until", "distil"),
    ],
)
def test_full_size_fits_in_24_gb(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["peak_memory_gb"] < 24
    assert json.loads(report["losses"][-1])["loss"] > 0
