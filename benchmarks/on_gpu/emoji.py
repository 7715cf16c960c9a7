"""Section f: the demo on the device: killed, resumed, evaluated; its pictures are kept for a look."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from on_gpu.results import Result, Setting, check, failed

ROOT = Path(__file__).parents[2]


def results(setting: Setting) -> Iterator[Result]:
    output = setting.work / "demo"
    sets: dict[str, object] = {"output": str(output), "checkpoint_every": 40}
    if setting.smoke:
        sets |= {"data.limit": 16, "stages.0.steps": 4, "checkpoint_every": 2, "sheet.every": 0}
        sets |= {"evaluation.steps": 2, "evaluation.limit": 2}
    command = [
        sys.executable,
        "-m",
        "prunet",
        "run",
        "demo",
        "--device",
        str(setting.device),
    ]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    start = time.perf_counter()
    yield _killed(command, output)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode:
        yield Result("the demo, resumed", ok=False, note=done.stderr[-300:])
        return
    resumed = "Resuming from step " in done.stderr  # of a checkpoint, whichever was the last
    yield Result("the demo, killed and resumed", time.perf_counter() - start, "s", ok=resumed)
    try:
        yield from _measures(output, setting)
    except Exception as error:
        yield failed("the demo's evaluation", error)


def _killed(command: list[str], output: Path) -> Result:
    """Kills the run as soon as its first checkpoint exists."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if list(output.glob("stage-1/checkpoints/step-*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    code = process.wait()
    return Result("the demo, killed after its first checkpoint", ok=code == -signal.SIGKILL, note=f"exit code {code}")


def _measures(output: Path, setting: Setting) -> Iterator[Result]:
    said = json.loads((output / "evaluation" / "evaluation.json").read_text())["distance"]
    for measure in ("denoiser", "picture"):
        before, after = said["before"][measure], said["after"][measure]
        note = f"{before:.4f} before, {after:.4f} after"
        most = 2.0 if setting.smoke else {"denoiser": 0.3, "picture": 0.7}[measure]
        yield check(f"{measure} distance after over before", after / before, most, note=note)
    shutil.copyfile(output / "evaluation" / "sheet.png", setting.out / "emoji-sheet.png")
    yield Result("pictures", note="emoji-sheet.png: teacher, student before, student after")
