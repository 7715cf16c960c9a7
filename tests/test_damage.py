"""Damage in a run folder is noticed: whatever file is damaged, however, each command ends in one line or works."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import call
from torch._utils import ExceptionWrapper

from prunet import Run, Runtime, UserError, load_recipe
from prunet.data import cache as blocks
from prunet.data.cache import Cache
from prunet.disk.files import read_json
from prunet.disk.ownership import LOCK
from prunet.disk.seals import CHECKSUM, SEAL
from prunet.exports.single_file import export_single_file
from prunet.report.run import write_report
from prunet.sampling.draw import open_model
from prunet.training import samples

CPU = Runtime(device="cpu", precision="no", log_every=1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size * 2 // 3)])


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(data))
    data[at] ^= 1 << at % 7
    path.write_bytes(data)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path) -> None:
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


WAYS: tuple[Callable[[Path, Path], None], ...] = (truncate, flip, empty, swap)


def files_of(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def partner(path: Path, files: list[Path]) -> Path:
    """Returns a file that could be mistaken for this one: one of the same name elsewhere, or else of the same kind."""
    alike = [f for f in files if f != path and f.name == path.name]
    alike = alike or [f for f in files if f != path and f.suffix == path.suffix] or [f for f in files if f != path]
    return next((f for f in alike if f > path), alike[0])


def commands(folder: Path, out: Path) -> dict[str, tuple]:
    """Returns the commands that read a run."""
    device = ("--device", "cpu", "--precision", "no")
    return {
        "compare": ("compare", folder, folder.parent / "whole", "-o", out / "page.html"),
        "generate": ("generate", folder, "a", "--steps", 1, "--size", 16, "-o", out / "a.png", *device),
        "evaluate": ("evaluate", folder, *device),
        "export": ("export", folder, "-o", out / "exported"),
        "export --single-file": ("export", folder, "--single-file", "-o", out / "x.safetensors"),
        "again": ("evaluate", folder, "--set", "evaluation.steps=2", *device),
        "resume": ("distil", folder, "--set", "stages.0.steps=3", *device),
        "run": ("run", folder, *device),
    }


def try_all(capsys, whole: Path, place: Path, name: Path, way: Callable, verbs: list[str]) -> list[int]:
    """Damages one file of a copy in the same way for each command; returns the exit codes."""
    codes = []
    for verb in verbs:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        folder = Path(shutil.copytree(whole, place / "run"))
        (place / "whole").symlink_to(whole)
        (out := place / "out").mkdir()
        way(folder / name, folder / partner(name, files_of(folder)))
        blocks._opened.cache_clear()
        code, _, err = call(capsys, *commands(folder, out)[verb])
        errors = [line for line in err.splitlines() if line.startswith("error")]
        assert code in (0, 2) and len(errors) == (code == 2) and "Traceback" not in err, (name, way, verb, err)
        codes.append(code)
    return codes


def test_some_file_damaged_in_some_way_is_one_line(finished, capsys, tmp_path) -> None:
    """Every third file is damaged in one way and read by one command; the slow test tries every combination."""
    files = [f for f in files_of(finished) if f.suffix != ".png" or f.name == "0001.png"]
    quick = ["compare", "generate", "export", "run"]
    refused = 0
    for i, name in enumerate(files[::3]):
        refused += sum(try_all(capsys, finished, tmp_path / "x", name, WAYS[i % 4], [quick[i % 4]]))
    assert refused > 2


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_file_damaged_in_every_way_is_one_line(way, finished, capsys, tmp_path) -> None:
    verbs = list(commands(finished, tmp_path))
    refused = {}
    for name in files_of(finished):
        codes = try_all(capsys, finished, tmp_path / "x", name, way, verbs)
        refused[str(name)] = [verb for verb, code in zip(verbs, codes, strict=True) if code]
    assert any(refused.values())
    with capsys.disabled():
        print(*(f"{way.__name__} {name}: {', '.join(verbs) or 'nowhere'}" for name, verbs in refused.items()), sep="\n")


# -- what each file is read for, and the message if it is damaged


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    blocks._opened.cache_clear()
    return Path(shutil.copytree(finished, tmp_path / "run"))


def opened(folder: Path) -> Run:
    return Run(load_recipe(folder / "recipe.yaml", [f"output={json.dumps(str(folder))}"]), CPU)


def last_byte(path: Path) -> None:
    """Flips a bit that no reader of the format checks."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


READ = {
    f"student/{WEIGHTS}": lambda f: opened(f)._evaluate(),
    f"stage-1/unet/{WEIGHTS}": lambda f: opened(f).last_unet(),
    "stage-1/unet/config.json": lambda f: opened(f)._export(),
    "cache/shard-00000.safetensors": lambda f: Cache.open(f / "cache").sample(3),
    "cache/unconditional.safetensors": lambda f: Cache.open(f / "cache").unconditional,
    "stage-1/checkpoints/step-0000002/optimizer.pt": lambda f: opened(f)._stage(1),
    "stage-1/checkpoints/step-0000002/ema.safetensors": lambda f: opened(f)._stage(1),
    "stage-1/checkpoints/step-0000002/student.safetensors": lambda f: opened(f)._stage(1),
    f"pipeline/vae/{WEIGHTS}": lambda f: export_single_file(f / "pipeline", f.parent / "x.safetensors"),
    f"pipeline/unet/{WEIGHTS}": lambda f: open_model(f),
    "stage-1/log.jsonl": write_report,
    "evaluation/pictures/after/0000.png": write_report,
}


def do_as_told(message: str, folder: Path) -> None:
    """Deletes what a message names: "X: damaged: delete it", "delete X and Y and run again"."""
    before, _, after = message.partition("delete ")
    paths = rf"{re.escape(str(folder))}/[\w./-]+\w"
    for path in re.findall(paths, before)[-1:] if after.startswith("it") else re.findall(paths, after):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


@pytest.mark.parametrize("name", READ)
def test_a_flipped_bit_is_named_and_the_advice_fixes_it(name, folder, finished) -> None:
    last_byte(folder / name)
    with pytest.raises(UserError, match=re.escape(name.rpartition("/")[2])) as error:
        READ[name](folder)
    before = files_of(folder)
    do_as_told(str(error.value), folder)
    assert files_of(folder) != before, error.value
    blocks._opened.cache_clear()
    for step in (again := opened(folder)).step_names("distil"):  # also the steps whose results no later step reads
        again.do(step)
    for weights in (f"student/{WEIGHTS}", f"stage-1/unet/{WEIGHTS}", "cache/shard-00000.safetensors"):
        assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize("name", ["steps.json", "plan.json", "evaluation/evaluation.json", "stage-1/pairs.json"])
def test_a_changed_value_in_a_json_file_is_noticed(name, folder) -> None:
    value = json.loads((folder / name).read_text())
    assert re.fullmatch("[0-9a-f]{8}", value[CHECKSUM])
    text = (folder / name).read_text()
    changed = (text[:at] + "2" + text[at + 1 :] for at, sign in enumerate(text) if sign == "1" and at >= len(text) // 3)
    # The 17th digit of a number may not count: two texts for the same float.
    (folder / name).write_text(next(other for other in changed if json.loads(other) != value))
    with pytest.raises(UserError, match=f"{Path(name).name}: (damaged or changed|not readable).*delete"):
        write_report(folder)
    (folder / name).write_text(json.dumps(value))  # the same value with other spaces
    write_report(folder)
    del value[CHECKSUM]
    (folder / name).write_text(json.dumps(value))  # as an older version wrote it
    write_report(folder)


def test_a_damaged_measurement_is_one_line(folder) -> None:
    (folder / "measured" / "x").mkdir(parents=True)
    (folder / "measured" / "x" / "measures.json").write_text("{}")
    with pytest.raises(UserError, match=r"measures.json: damaged, or of another version .*: delete it, or"):
        write_report(folder)


def test_files_of_another_run_are_noticed(folder, finished, tmp_path) -> None:
    recipe = load_recipe(finished / "recipe.yaml", [f"output={tmp_path / 'other'}", "seed=5", "stages.0.ema_decay=0.5"])
    other = Run(recipe, CPU)
    other.finish("evaluate")
    for name, words, read in (
        ("stage-1/unet", "of another run", lambda: opened(folder)._export()),
        ("evaluation", "of another student", lambda: write_report(folder)),
        ("cache/shard-00000.safetensors", "of another cache", lambda: Cache.open(folder / "cache").sample(0)),
    ):
        shutil.rmtree(folder)
        shutil.copytree(finished, folder)
        copy = shutil.copytree if (other.folder / name).is_dir() else shutil.copyfile
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        copy(other.folder / name, folder / name)
        blocks._opened.cache_clear()
        with pytest.raises(UserError, match=words):
            read()


def test_caches_and_runs_of_older_versions_are_read(folder) -> None:
    """They have no marks and no checksums."""
    latents = Cache.open(folder / "cache").sample(2).mean
    for mark in (*folder.rglob(SEAL), *folder.rglob(LOCK)):
        mark.unlink()
    for path in folder.rglob("*.json"):
        if "pipeline" not in path.parts and path.name != "config.json":
            value = read_json(path)
            if path.name == "cache.json":
                value = {key: value[key] for key in ("counts", "samples", "skipped", "cut", "source")} | {"groups": []}
            path.write_text(json.dumps(value["pairs"] if path.name == "pairs.json" else value))
    steps = read_json(folder / "steps.json")
    (folder / "steps.json").write_text(json.dumps({n: {"inputs": s["inputs"], "seconds": 1} for n, s in steps.items()}))
    for path in (folder / "cache").glob("*.safetensors"):
        label = blocks.block_label(path) if "shard" in path.name else {}
        label.pop(CHECKSUM, None)
        save_file(load_file(path), path, metadata={"label": json.dumps(label)})
    blocks._opened.cache_clear()
    this = opened(folder)
    assert not this.todo()
    assert torch.equal(Cache.open(folder / "cache").sample(2).mean, latents)
    this._export()
    write_report(folder)


def test_an_error_in_a_loader_worker_is_one_line(monkeypatch) -> None:
    """Torch puts the worker's traceback before it."""

    def load(*args: object, **options: object) -> None:
        try:
            raise UserError("a/shard-00000.safetensors: damaged: delete it")
        except UserError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    monkeypatch.setattr(samples, "DataLoader", load)
    with pytest.raises(UserError, match=r"^a/shard-00000\.safetensors: damaged: delete it$"):
        next(samples.batches(None, 0, 1, 0, 1))


def test_a_block_is_verified_once(folder, monkeypatch) -> None:
    seen: list[str] = []
    real = blocks.block_checksum
    monkeypatch.setattr(blocks, "block_checksum", lambda path, *rest: seen.append(path.name) or real(path, *rest))
    for _ in range(2):
        opened_cache = Cache.open(folder / "cache")
        for i in (0, 3, 5):
            opened_cache.sample(i)
    assert seen == ["shard-00000.safetensors"]
