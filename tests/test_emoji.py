"""What ships: the emoji data with its splits, and the teacher trained on it."""

import itertools
import json
import tarfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from prunet import Teacher, derive, load_plan, load_recipe
from prunet.recipe import read_prompts
from prunet.sources import read_pictures

EMOJI = Path(__file__).parent.parent / "emoji"
STYLES = {"3d", "noto", "flat"}


def records(split: str) -> list[dict]:
    out = []
    for shard in sorted((EMOJI / "data").glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            out += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return out


def test_held_out_labels_and_combinations_are_in_no_training_picture() -> None:
    train, combinations, labels = map(records, ("train", "heldout-combinations", "heldout-labels"))
    seen = {(r["label"], r["style"]) for r in train}
    assert not seen & {(r["label"], r["style"]) for r in combinations}
    assert not {r["label"] for r in train + combinations} & {r["label"] for r in labels}
    every = train + combinations + labels
    assert {r["style"] for r in every} == STYLES
    count = len({r["label"] for r in every})
    assert 0.04 < len({r["label"] for r in labels}) / count < 0.06
    assert 0.09 < len(combinations) / (len(train) + len(combinations)) < 0.12
    assert all(len(r["captions"]) >= 4 for r in every)


def test_size_in_the_repository() -> None:
    assert sum(f.stat().st_size for f in (EMOJI / "data").glob("*.tar")) <= 25e6
    assert sum(f.stat().st_size for f in (EMOJI / "emoji-sd").rglob("*") if f.is_file()) <= 60e6


def test_teacher_is_a_stock_pipeline_of_the_sd_v1_layout() -> None:
    pipe = DiffusionPipeline.from_pretrained(EMOJI / "emoji-sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe("red heart, 3d", num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 128, 128, 3)
    config = Teacher(EMOJI / "emoji-sd").unet_config
    assert (len(config["down_block_types"]), config["layers_per_block"], config["sample_size"]) == (4, 2, 16)
    for plan in ("bk-base", "bk-small", "bk-tiny"):
        derive(config, load_plan(plan))


def test_teacher_tells_a_red_heart_from_a_green_one() -> None:
    """Drawn at guidance 5 in 12 steps: the middle of the picture has the colour that the prompt names."""
    pipe = DiffusionPipeline.from_pretrained(EMOJI / "emoji-sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    middle = {}
    for colour in ("red", "green", "blue"):
        rng = torch.Generator().manual_seed(0)
        picture = pipe(
            f"{colour} heart, 3d", num_inference_steps=12, guidance_scale=5.0, generator=rng, output_type="np"
        )
        middle[colour] = picture.images[0, 48:80, 48:80].mean((0, 1))
    assert middle["red"].argmax() == 0
    assert middle["green"].argmax() == 1
    assert middle["blue"].argmax() == 2


def test_demo_evaluates_on_what_the_student_never_saw(monkeypatch) -> None:
    monkeypatch.chdir(EMOJI.parent)
    recipe = load_recipe("recipes/demo.yaml")
    shown = itertools.islice(read_pictures(recipe.data.source), recipe.data.limit)
    captions = {caption for picture in shown for caption in picture.captions}
    prompts = read_prompts(recipe.evaluation.prompts)
    assert len(prompts) == 12
    assert not captions & set(prompts)
