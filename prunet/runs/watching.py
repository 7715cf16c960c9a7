"""The current state of a run, read from its files; nothing is written."""

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from prunet.data.cache import BLOCK
from prunet.disk.ownership import worker_of
from prunet.disk.steps import read_steps
from prunet.errors import UserError
from prunet.recipe.recipe import Recipe, load_recipe
from prunet.runs.steps import step_names
from prunet.training.log import read_log

QUERY = ("name", "utilization.gpu", "memory.used", "memory.total")


def look(folder: Path) -> dict[str, Any]:
    """Returns the state of a run, with these keys:

    `step` (None: all are done), `done` of `of` pieces (of the kind `unit`), `next` steps, `seconds` left of all
    training steps (None: not known yet), `first` and `last` row of the log, `sheet`, `worker`, `devices`.

    Raises:
        UserError: the folder is not a run, or a file is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder: give the 'output' of a recipe after `prunet run` has begun")
    recipe, finished = load_recipe(folder / "recipe.yaml"), read_steps(folder)
    stages = recipe.stages
    todo = [name for name in step_names(len(stages), "report") if name not in finished]
    paths = [folder / f"stage-{number}" / "log.jsonl" for number in range(1, len(stages) + 1)]
    logs = [read_log(path) if path.is_file() else [] for path in paths]
    steps = [rows[-1]["step"] if rows else 0 for rows in logs]
    rows: list[dict[str, Any]] = next((rows for rows in reversed(logs) if rows), [])
    speed = rows[-1].get("images_per_s") if rows else None
    left = sum((s.steps - step) * s.batch_size for s, step in zip(stages, steps, strict=True))
    worker = worker_of(folder)
    found: dict[str, Any] = {"run": str(folder), "worker": worker, "step": todo[0] if todo else None, "next": todo[1:]}
    found |= _progress(folder, recipe, found["step"], steps)
    found |= {"seconds": left / speed if speed else None, "first": rows[0] if rows else None}
    sheets = sorted(folder.glob("stage-*/sheets/step-*.png"), key=lambda path: path.stat().st_mtime)
    found |= {"last": rows[-1] if rows else None, "sheet": str(sheets[-1]) if sheets else None}
    return found | {"devices": devices(worker)}


def _progress(folder: Path, recipe: Recipe, step: str | None, steps: list[int]) -> dict[str, Any]:
    """Returns `done`, `of` and `unit` of a step with progress."""
    if step == "cache":
        blocks = len(list(Path(recipe.cache or folder / "cache").glob("shard-*.safetensors")))
        return {"done": blocks * BLOCK, "of": None, "unit": "samples"}
    if step and step.startswith("stage-"):
        number = int(step.removeprefix("stage-")) - 1
        return {"done": steps[number], "of": recipe.stages[number].steps, "unit": "steps"}
    return {"done": None, "of": None, "unit": ""}


def devices(worker: str | None) -> list[dict[str, Any]]:
    """Returns the devices: `name`, `busy` (0 to 1), `used` and `total` bytes of memory.

    These are the GPUs that `nvidia-smi` reports; without one, the processor with the memory of the process that works.
    """
    if tool := shutil.which("nvidia-smi"):
        ask = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
            rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
            return [
                {"name": name, "busy": int(busy) / 100, "used": int(used) << 20, "total": int(total) << 20}
                for name, busy, used, total in rows
            ]
        except (OSError, ValueError, subprocess.SubprocessError):  # nvidia-smi without a driver
            pass
    used = 0
    with suppress(IndexError, psutil.Error):  # no process works, or it works on another machine
        used = psutil.Process(int(re.findall(r"\d+", worker or "")[0])).memory_info().rss
    total = psutil.virtual_memory().total
    return [{"name": "CPU", "busy": psutil.cpu_percent(0.2) / 100, "used": used, "total": total}]
