"""Teachers, pictures and a finished run that tests share: the first process of a session that asks makes them.

No test writes to them; a test that changes one works on a copy.
"""

import fcntl
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SMALL_UNETS, make_pictures, make_pipeline, make_tokenizer

__all__ = ["SMALL_UNETS", "make_pictures", "make_pipeline", "make_tokenizer"]

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and the processes of tests would too


def pytest_collection_finish() -> None:
    """Excludes the half million objects of all imports from garbage collection, a sixth of the tests' time."""
    gc.freeze()


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Returns a function that gives the folder of a name; the first process that asks makes it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own within that of the session
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / "shared" / name, shared / "shared" / f".{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with (folder.parent / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session", autouse=True)
def few_repeats() -> Iterator[None]:
    """Three repeats of what is timed are enough, because no test asserts a time."""
    from prunet.speed import clock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "MOST_SECONDS", 0)
        yield


@pytest.fixture(scope="session")
def sd(once: Once) -> Path:
    return once("sd", lambda folder: make_pipeline(folder, "sd"))


@pytest.fixture(scope="session")
def sd_v(once: Once) -> Path:
    return once("sd_v", lambda folder: make_pipeline(folder, "sd", prediction_type="v_prediction"))


@pytest.fixture(scope="session")
def sdxl(once: Once) -> Path:
    return once("sdxl", lambda folder: make_pipeline(folder, "sdxl"))


@pytest.fixture(scope="session")
def sdxl_deep(once: Once) -> Path:
    return once("sdxl_deep", lambda folder: make_pipeline(folder, "sdxl_deep"))


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    return once("pictures", make_pictures)


@pytest.fixture(scope="session")
def finished(sd: Path, pictures: Path, once: Once) -> Path:
    """A finished run of one stage on `sd`; copy it to change it."""
    from prunet import Runtime, load_recipe, run

    values = {
        "teacher": str(sd),
        "plan": "bk-small",
        "data": {"source": str(pictures)},
        "stages": [{"steps": 2, "batch_size": 2, "warmup_steps": 0}],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 1},
        "sheet": {"every": 2},
        "checkpoint_every": 1,
    }

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(json.dumps(values | {"output": str(folder / "run")}))
        run(load_recipe(folder / "recipe.yaml"), Runtime(device="cpu", precision="no", log_every=1))

    return once("finished", make) / "run"


@pytest.fixture(scope="module")
def run_folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `finished` for each module, which its tests may add to."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("run") / "run"))


@contextmanager
def dies_after_checkpoint(step: int) -> Iterator[None]:
    """The training in the block ends as if it were killed, right after the checkpoint of this step was written."""
    from prunet.training import session

    save = session.save

    def save_and_die(state: object, folder: Path, at: int, *rest: object) -> None:
        save(state, folder, at, *rest)
        if at == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "save", save_and_die)
        yield


def levels_apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())
