"""Teachers and pictures that tests share, made once a session."""

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
