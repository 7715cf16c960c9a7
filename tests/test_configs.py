"""Configs of a teacher's parts: what does not fit is one line that names the file and the field."""

import json
import shutil
from pathlib import Path

import pytest

from prunet import Teacher, UserError, load_plan
from prunet.plan.derived import derive

#: Field, and values that none of its kind has.
BAD = {
    "unet/config.json": {
        "block_out_channels": [None, 32, [16, None, 32, 32], [16, -1, 32, 32], [10**12] * 4, [16] * 1000, [True] * 4],
        "down_block_types": [None, "DownBlock2D", ["AttnDownBlock2D"] * 4, ["DownBlock2D"], [["DownBlock2D"]] * 4],
        "up_block_types": [[], ["UpBlock2D"] * 3, {"UpBlock2D": 4}],
        "mid_block_type": ["UNetMidBlock3D", 2, ["UNetMidBlock2D"]],
        "layers_per_block": [None, 0, 10**9, True, "2", [2, 2, 2], [2, 2, 2, 10**9], 2.5],
        "transformer_layers_per_block": [-1, 10**6, [1, 1, 1, 10**6], [[[1]]], "x", 90],
        "cross_attention_dim": [None, -1, "x", 10**30, {}],
        "attention_head_dim": [0, "x", [2, 2], None],
        "norm_num_groups": [0, 7, "x", 10**9],
        "in_channels": [True, 9, 0],
        "out_channels": [6, None],
        "sample_size": [-8, [8], [8, 8, 8], "x", 10**12],
        "act_fn": [None, 3, "x", []],
        "dual_cross_attention": [True],
        "addition_embed_type": ["text_time", "x", 3],
        "class_embed_type": ["projection", "timestep", []],
        "resnet_time_scale_shift": ["x"],
        "conv_in_kernel": ["x", -3, 10**9],
        "encoder_hid_dim_type": ["text_proj", "x"],
        "time_embedding_type": ["x", None],
        "use_linear_projection": ["x", 1],
        "_class_name": ["UNet3DConditionModel", [], 3],
    },
    "vae/config.json": {
        "block_out_channels": [None, [], 8, ["8", "8"]],
        "scaling_factor": ["x", 0, -1, float("nan"), float("inf"), [1], True],
        "latent_channels": [None, 8, "x"],
        "force_upcast": ["no", 1],
        "layers_per_block": [10**9, -1],
    },
    "text_encoder/config.json": {
        "hidden_size": [None, -1, "x"],
        "num_hidden_layers": [10**9, [], 0],
        "vocab_size": [10**12, "x"],
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": [0, 10**12, "x", None, True, [1000]],
        "beta_start": [-1, "x", float("nan"), 5],
        "beta_end": [None, 1, 10**300],
        "beta_schedule": ["x", [], None],
        "trained_betas": [["x"], [2.0], "x", [0.1] * 200_000],
        "prediction_type": ["x", None, ["epsilon"]],
    },
    "model_index.json": {
        "_class_name": [None, [], {}, 3, "FluxPipeline"],
        "unet": [[], [None], ["a", "b", "c"], [["diffusers"], "x"]],
        "requires_safety_checker": ["x"],
    },
}


@pytest.mark.parametrize("file", BAD)
def test_a_field_that_does_not_fit_is_one_line(file: str, sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "teacher")
    whole = json.loads((folder / file).read_text())
    for field, values in BAD[file].items():
        for value in values:
            (folder / file).write_text(json.dumps({**whole, field: value}))
            with pytest.raises(UserError) as error:
                teacher = Teacher(folder)
                _ = derive(teacher.unet_config, load_plan("bk-tiny")).student_size
                _ = teacher.noise_scheduler
                teacher.check_weights()
                pytest.fail(f"{field}: {value!r:.80} was taken")
            assert "\n" not in str(error.value)
            named = (field, field.strip("_"), str(value), "UNet2DConditionModel", "U-Net", "scheduler")
            assert any(name in str(error.value) for name in named), f"{field}: {error.value}"


def test_an_unknown_key_is_left_to_diffusers(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.bin"))
    for file in ("vae/config.json", "text_encoder/config.json", "model_index.json"):
        whole = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**whole, "of_another_version": 10**12, "notes": {"a": [None]}}))
    teacher = Teacher(folder)
    teacher.check_weights()
    assert teacher.scaling_factor == Teacher(sd).scaling_factor
