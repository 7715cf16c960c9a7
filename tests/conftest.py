"""Teachers and pictures that tests share, made once a session."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from small_models import SMALL_UNETS, make_pictures, make_pipeline, make_tokenizer

__all__ = ["SMALL_UNETS", "make_pictures", "make_pipeline", "make_tokenizer"]

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teachers") / "sd", "sd")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teachers") / "sdxl", "sdxl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def finished(sd: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one stage on `sd`, to be copied."""
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
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(json.dumps(values | {"output": str(folder / "run")}))
    return run(load_recipe(folder / "recipe.yaml"), Runtime(device="cpu", precision="no", log_every=1))
