"""Checks prunet's claims on a GPU, with one command and in ten minutes.

    python benchmarks/gpu.py --out report                          # all sections, 540 s at most
    python benchmarks/gpu.py --out report --only distill-sd memory
    python benchmarks/gpu.py --out /tmp/report --device cpu --smoke  # the same code on small models, two minutes

Needs prunet, the shipped `emoji/emoji-sd` and `emoji/data/train-0000.tar`, and no network. Full sizes have random
weights: neither speed nor memory depends on them. Each section is a process of its own with a time limit of its own,
and one that fails does not stop the rest. In `--out` each leaves NAME.json, written again after every result, and
NAME.log; `results.md` is the table of all of them so far. Exit code 1 when a check failed or a section broke off;
a missed goal of speed or memory is reported in the table, but is not a failure.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

#: A section that would get less time is not started.
LEAST_SECONDS = 15


@dataclass(frozen=True)
class Section:
    """A name, its module in `on_gpu` with the arguments of its `results`, and the most seconds that it may take."""

    name: str
    module: str
    seconds: int
    arguments: tuple[str, ...] = ()


#: In the order of their importance.
SECTIONS = (
    Section("correctness", "correctness", 110),
    Section("distill-sd", "distill", 120, ("sd-v1",)),
    Section("distill-sdxl", "distill", 90, ("sdxl",)),
    Section("memory", "memory", 85),
    Section("emoji", "emoji", 70),
    Section("kernels", "kernels", 30),
    Section("inference", "inference", 150),  # compilation takes long, so it gets the time that is left
)


def facts(device: str) -> dict[str, str]:
    """Returns what the numbers depend on: the card, and versions of the software."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from prunet.speed.clock import device_name

    found = {"device": device_name(torch.device(device)), "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def child(section: Section, args: argparse.Namespace) -> None:
    """Runs one section in this process, and writes all results after each new one."""
    import importlib

    import torch
    from on_gpu.results import Setting

    if args.smoke:
        torch.set_num_threads(1)  # more threads would only wait for each other
        # Inductor would compile for minutes; the graphs and their breaks are the same without it.
        compile_by = torch.compile
        torch.compile = lambda f=None, **given: compile_by(f, **{"backend": "eager", **given})  # type: ignore[assignment]
    module = importlib.import_module(f"on_gpu.{section.module}")
    said: dict[str, Any] = {"section": section.name, "ended": False, **facts(args.device), "results": []}
    began = time.perf_counter()

    def write() -> None:
        said["seconds"] = round(time.perf_counter() - began, 1)
        part = args.out / f".{section.name}.part"
        part.write_text(json.dumps(said, indent=1) + "\n")
        part.replace(args.out / f"{section.name}.json")

    write()
    work = args.work / section.name if args.smoke else args.work  # sections share models, unless they run at once
    setting = Setting(torch.device(args.device), args.smoke, args.out, work)
    for result in module.results(setting, *section.arguments):
        said["results"].append(asdict(result))
        print(f"[{time.perf_counter() - began:6.1f} s] {result}", flush=True)
        write()
    said["ended"] = True
    write()


def run(section: Section, args: argparse.Namespace, seconds: float) -> str:
    """Starts one section and waits for it; returns how it ended."""
    command = [sys.executable, __file__, "--out", str(args.out), "--work", str(args.work), "--device", args.device]
    command += ["--section", section.name, *(["--smoke"] if args.smoke else [])]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with (args.out / f"{section.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {seconds:.0f} s"
        finally:  # also ends the processes that it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "" if code == 0 else f"ended with exit code {code}; see {section.name}.log"


def table(args: argparse.Namespace, ends: dict[str, str]) -> str:
    """Formats all results so far as Markdown."""
    from on_gpu.results import Result

    rows, first = [], None
    for section in SECTIONS:
        path = args.out / f"{section.name}.json"
        said = json.loads(path.read_text()) if path.is_file() and section.name in ends else None
        first = first or said
        rows += [(section.name, Result(**value)) for value in (said["results"] if said else [])]
        if end := ends.get(section.name):
            rows.append((section.name, Result("(section)", ok=False, note=end)))
    known = {k: v for k, v in (first or {}).items() if k not in ("section", "ended", "results", "seconds")}
    lines = [f"# On a GPU, {date.today()}", "", ", ".join(f"{k} {v}" for k, v in known.items()), ""]
    if args.smoke:
        lines += ["**Smoke run on small models: the code runs; its speeds and memory say nothing.**", ""]
    lines += ["| section | what | measured | goal | | |", "|---|---|---:|---|---|---|"]
    lines += [f"| {name} | {row.cells()} |" for name, row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="for all sections together (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SECTIONS], help="these sections")
    parser.add_argument("--smoke", action="store_true", help="small models: whether the code runs")
    parser.add_argument("--work", type=Path, help="where models and caches go (some 20 GB); a temporary folder")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        child(next(s for s in SECTIONS if s.name == args.section), args)
        return 0
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp(prefix="prunet-gpu-"))
    args.work, ends = work, {}

    def started(section: Section) -> str:
        left = args.seconds - (time.perf_counter() - began)
        if left < LEAST_SECONDS:
            return "not started: no time left"
        return run(section, args, left if args.smoke else min(section.seconds, left))

    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    try:
        # Timed sections run alone; a smoke run has two at once, one on each of two cores.
        with ThreadPoolExecutor(2 if args.smoke else 1) as pool:
            for section, end in zip(chosen, pool.map(started, chosen), strict=True):
                ends[section.name] = end
                print(f"{section.name}: {end or 'done'} ({time.perf_counter() - began:.0f} s)", flush=True)
                (args.out / "results.md").write_text(table(args, ends))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = (args.out / "results.md").read_text()
    print(text)
    return 1 if "| FAILED |" in text else 0


if __name__ == "__main__":
    raise SystemExit(main())
