"""The small decoder: distilled on a run's latents, a stock AutoencoderTiny, finished or resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from test_cli import call

from prunet import Teacher
from prunet.runs.decoder import micro_batch_for
from prunet.training.log import read_log
from prunet.training.objectives.decoding import small_decoder


def test_decoder_learns_and_is_stock(run_folder, capsys) -> None:
    code, out, _ = call(capsys, "decoder", run_folder, "--steps", "60", "--device", "cpu", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0 and facts["held_out"] == 2
    rows = read_log(run_folder / "decoder-training" / "log.jsonl")
    assert rows[-1]["step"] == 60 and rows[-1]["pixel"] < 0.5 * rows[0]["pixel"]
    vae = AutoencoderTiny.from_pretrained(run_folder / "decoder")
    assert sum(p.abs().sum() for p in vae.encoder.parameters()) == 0  # nobody can mistake it for a trained encoder
    teacher = Teacher(run_folder / "pipeline")
    pipe = StableDiffusionPipeline.from_pretrained(run_folder / "pipeline", vae=vae)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipe("a cat", num_inference_steps=1, latents=latents, output_type="pt").images
    assert drawn.shape == (1, 3, teacher.native_size, teacher.native_size)
    # A second time nothing is trained; with another number of steps the finished decoder is not returned.
    code, out, err = call(capsys, "decoder", run_folder, "--steps", "60", "--device", "cpu")
    assert code == 0 and "is done" in err and f"PSNR {facts['psnr']:.1f} dB" in out
    code, _, err = call(capsys, "decoder", run_folder, "--steps", "61", "--device", "cpu")
    assert code == 2 and "made from other inputs" in err


def test_decoder_resumes_to_the_same_weights(run_folder, tmp_path, capsys) -> None:
    whole, stopped = (Path(shutil.copytree(run_folder, tmp_path / name)) for name in ("whole", "stopped"))
    for folder in (whole, stopped):
        shutil.rmtree(folder / "decoder", ignore_errors=True)
        shutil.rmtree(folder / "decoder-training", ignore_errors=True)
    assert call(capsys, "decoder", whole, "--steps", "6", "--device", "cpu")[0] == 0
    shutil.copytree(whole / "decoder-training", stopped / "decoder-training")
    for late in sorted((stopped / "decoder-training" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(late)
    code, _, err = call(capsys, "decoder", stopped, "--steps", "6", "--device", "cpu")
    assert code == 0 and "Resuming from step 5 of 6" in err
    one, two = (AutoencoderTiny.from_pretrained(folder / "decoder").state_dict() for folder in (whole, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_form_follows_the_vae(sd) -> None:
    net = small_decoder(Teacher(sd))
    assert net.config.decoder_block_out_channels == (16, 16) and net.config.num_decoder_blocks == (3, 1)
    assert net.decode(torch.zeros(1, 4, 4, 4)).sample.shape == (1, 3, 8, 8)


def test_refuses_a_run_without_its_cache(run_folder, tmp_path, capsys) -> None:
    copy = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "decoder*"))
    code, _, err = call(capsys, "decoder", copy, "--device", "cpu")
    assert code == 2 and "no finished cache there" in err
    code, _, err = call(capsys, "decoder", tmp_path, "--device", "cpu")
    assert code == 2 and "not a run folder" in err


@pytest.mark.parametrize(("side", "count"), [(16, 8), (32, 4), (48, 1), (64, 1), (128, 1)])
def test_large_pictures_are_decoded_one_by_one(side, count) -> None:
    """Eight at once of 512 px take 22 GB."""
    assert micro_batch_for(side, side) == count
