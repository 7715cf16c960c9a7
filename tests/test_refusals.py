"""What `prunet run` would refuse, `prunet estimate` refuses in the same words, and neither writes anything."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import call

Change = Callable[[Path], None]


def config(file: str, **values: Any) -> Change:
    """A teacher with other values in one of its configs."""

    def change(teacher: Path) -> None:
        path = teacher / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def without(name: str) -> Change:
    return lambda teacher: (teacher / name).unlink()


def cut(name: str) -> Change:
    return lambda teacher: (teacher / name).write_bytes((teacher / name).read_bytes()[:100])


WEIGHTS = "diffusion_pytorch_model.safetensors"
TEACHERS: dict[str, Change] = {
    "no U-Net": without(f"unet/{WEIGHTS}"),
    "no VAE": without(f"vae/{WEIGHTS}"),
    "no text encoder": without("text_encoder/model.safetensors"),
    "no tokenizer": without("tokenizer/tokenizer.json"),
    "no scheduler": without("scheduler/scheduler_config.json"),
    "no config of the text encoder": without("text_encoder/config.json"),
    "U-Net cut off": cut(f"unet/{WEIGHTS}"),
    "VAE cut off": cut(f"vae/{WEIGHTS}"),
    "text encoder cut off": cut("text_encoder/model.safetensors"),
    "depth": config("unet/config.json", layers_per_block=10**9),
    "a U-Net of LCM": config("unet/config.json", time_cond_proj_dim=256),
    "width": config("unet/config.json", block_out_channels=["16"] * 4),
    "text encoder of another width": config("text_encoder/config.json", hidden_size=24),
    "layers of the text encoder": config("text_encoder/config.json", num_hidden_layers=-1),
    "scaling factor": config("vae/config.json", scaling_factor=0),
    "shifted latents": config("vae/config.json", shift_factor=0.1),
    "flow matching": config("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
    "scheduler of no such name": config("scheduler/scheduler_config.json", _class_name="NoSuchScheduler"),
    "prediction": config("scheduler/scheduler_config.json", prediction_type="sample"),
    "betas": config("scheduler/scheduler_config.json", beta_end=2),
    "timesteps that no sampler has": config("scheduler/scheduler_config.json", timestep_spacing="wide"),
    "fewer timesteps than drawing takes": config("scheduler/scheduler_config.json", num_train_timesteps=2),
}
STAGE = {"steps": 2, "batch_size": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "unknown key": {"stage": []},
    "true": {"seed": True},
    "plan": {"plan": "bk-tny"},
    "pattern": {"plan": ["down_blocks.9"]},
    "half a pair": {"plan": ["up_blocks.0"]},
    "braces": {"plan": ["mid_block" + "{,a}" * 50]},
    "two plans": {"stages": [{**STAGE, "plan": "bk-tiny"}, STAGE]},
    "weights of nothing": {"stages": [{**STAGE, "losses": {"weights": {"side_blocks": 2}}}]},
    "weights of braces": {"stages": [{**STAGE, "losses": {"weights": {"up_blocks" + "{,a}" * 50: 2}}}]},
    "size": {"data": {"source": "PICTURES", "size": 24}},
    "no pictures": {"data": {"source": "nowhere"}},
    "no prompts": {"data": {"prompts": "nowhere.txt"}},
    "no prompts to evaluate": {"evaluation": {"prompts": "nowhere.txt"}},
    "sampler": {"evaluation": {"prompts": ["a"], "sampler": "best"}},
    "more steps than timesteps": {"data": {"prompts": ["a", "b"], "steps": 1000}, "teacher": "SHORT"},
    "steps of drawing": {"evaluation": {"prompts": ["a"], "steps": 10**6}},
    "teacher": {"teacher": "nowhere"},
    "teacher of a stage": {"stages": [STAGE, {**STAGE, "teacher": "nowhere"}]},
    "config of a folder": {"teacher": {"source": "TEACHER", "config": "TEACHER"}},
    "output under a file": {"output": "TEACHER/model_index.json/run"},
    "cache under a file": {"cache": "TEACHER/model_index.json/cache"},
    "more than a page, by aliases": {"sheet": {"prompts": "LONG"}},
    "more than the disk": {"keep_checkpoints": 10**9, "checkpoint_every": 1, "stages": [{**STAGE, "steps": 10**9}]},
}


#: What another case finds in the same way.
ALIKE = {"no text encoder", "no config of the text encoder", "VAE cut off", "text encoder cut off", "width", "true"}
ALIKE |= {"layers of the text encoder", "betas", "prediction", "teacher of a stage", "cache under a file", "pattern"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in (*TEACHERS, *RECIPES)]
)
def test_estimate_finds_what_run_would_refuse(case: str, capsys, sd: Path, pictures: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(sd, tmp_path / "teacher") if case in TEACHERS else sd
    TEACHERS.get(case, lambda _: None)(teacher)
    value = {
        **{"teacher": "TEACHER", "plan": "bk-small", "data": {"source": "PICTURES"}, "stages": [STAGE]},
        **{"evaluation": {"prompts": ["a"], "steps": 4}, "output": str(tmp_path / "run")},
        **RECIPES.get(case, {}),
    }
    text = yaml.safe_dump(value).replace("TEACHER", str(teacher)).replace("PICTURES", str(pictures))
    text = text.replace("LONG", f"[&long {'a ' * 5000}, {', '.join(['*long'] * 60)}]")
    if "SHORT" in text:
        short = shutil.copytree(sd, tmp_path / "short")
        config("scheduler/scheduler_config.json", num_train_timesteps=500)(short)
        text = text.replace("SHORT", str(short))
    (tmp_path / "recipe.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    ends = [call(capsys, verb, tmp_path / "recipe.yaml", "--device", "cpu") for verb in ("estimate", "run")]
    (code, _, said), (_, _, said_by_run) = ends
    assert code == 2 and said.count("error: ") == 1, said
    assert said == said_by_run
    assert sorted(tmp_path.rglob("*")) == before
