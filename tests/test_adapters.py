"""The teacher's LoRA, IP-Adapter and ControlNet on its students: carried over, and loaded by stock diffusers."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SMALL_UNETS
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunet import UserError, adapt, derive, load_plan
from prunet.adapters.adapt import MARK
from prunet.denoisers.architecture import teacher_name
from prunet.denoisers.unet2d.form import make_unet
from prunet.denoisers.unet2d.student_controlnet import StudentControlNet
from prunet.disk.files import write_json
from prunet.plan.derived import Derived

PLANS = {
    "bk-base": "sd",
    "bk-small": "sd",
    "bk-tiny": "sd",
    "ssd-1b": "sdxl",
    "vega": "sdxl",
    "koala-1b": "sdxl_deep",
    "koala-700m": "sdxl_deep",
}
each_plan = pytest.mark.parametrize("plan", PLANS)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]


@cache
def derived_of(plan: str) -> Derived:
    return derive(make_unet(SMALL_UNETS[PLANS[plan]]).config, load_plan(plan))


@pytest.fixture
def run(tmp_path):
    """A run's folder, as far as `adapt` reads it."""

    def make(plan: str) -> Path:
        folder = tmp_path / f"run-{plan}"
        folder.mkdir(exist_ok=True)
        write_json(folder / "plan.json", derived_of(plan).facts())
        return folder

    return make


def deltas(unet) -> dict[str, Tensor]:
    """Layer with a LoRA -> what it adds to the layer's weight, times its scale."""
    layers = ((name, module) for name, module in unet.named_modules() if getattr(module, "lora_A", None))
    return {name: module.get_delta_weight(next(iter(module.lora_A))) for name, module in layers}


@cache
def trained(kind: str):
    """A teacher's LoRA: its layers' deltas, its weights as PEFT has them, its config."""
    torch.manual_seed(0)
    unet = make_unet(SMALL_UNETS[kind])
    ranks = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 2, "to_out.0": 5}}
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=EVERYWHERE, **ranks), adapter_name="a"
    )
    return deltas(unet), get_peft_model_state_dict(unet, adapter_name="a"), unet.peft_config["a"].to_dict()


def alpha_of(module: str) -> float:
    return 2 if module.endswith("to_k") else 5 if module.endswith("to_out.0") else 6


def pipeline_of(kind: str):
    return StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline


def kohya(state) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        module, side = re.fullmatch(r"(.*)\.lora_(A|B)\.weight", key).groups()
        name = "lora_unet_" + module.replace(".", "_")
        out[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.contiguous()
        out[f"{name}.alpha"] = torch.tensor(6.0)  # of different ones stock diffusers reads the most frequent
    return out


def sgm(state, layers: int) -> dict[str, Tensor]:
    """kohya's names of SDXL, by its own rule: input_blocks and output_blocks counted through all stages."""
    out = {}
    for key, value in kohya(state).items():
        if found := re.match(r"lora_unet_(down|up)_blocks_(\d+)_attentions_(\d+)_(.*)", key):
            way, number = found[1], int(found[2]) * (layers + 1) + int(found[3])
            block = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
            key = f"lora_unet_{block}_1_{found[4]}"
        key = re.sub(r"mid_block_attentions_0", "middle_block_1", key)
        out[key] = value
    return out


def write_lora(path: Path, kind: str, form: str) -> tuple[Path, dict[str, Tensor]]:
    """The teacher's LoRA in a format, and the deltas of the layers that are in it."""
    wanted, state, config = trained(kind)
    if form in ("diffusers", "sgm"):  # of attentions only: more of those the stock loader does not read
        state = {key: value for key, value in state.items() if re.search(r"\.to_(q|k|v|out\.0)\.", key)}
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}
    text["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(16, 4)
    if form == "peft":
        layers = {f"unet.{key}": value.contiguous() for key, value in state.items()} | text
        metadata = {f"unet.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        metadata |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.target_modules": ["q_proj"]}
        save_file(layers, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, default=str)})
    elif form == "diffusers":
        scaled = {
            k: v * alpha_of(k[: -len(".lora_B.weight")]) / v.shape[1] if "lora_B" in k else v for k, v in state.items()
        }
        old = {f"unet.{key}": value.contiguous() for key, value in convert_state_dict_to_diffusers(scaled).items()}
        save_file(old, path)
    else:
        layers = kohya(state) if form == "kohya" else sgm(state, SMALL_UNETS[kind]["layers_per_block"])
        save_file(layers, path, metadata={"ss_network_dim": "4", "sshs_model_hash": "0"})
    modules = {key[: -len(".lora_A.weight")] for key in state if "lora_A" in key}
    scale = {name: 6 / alpha_of(name) if form in ("kohya", "sgm") else 1 for name in modules}
    return path, {name: wanted[name] * scale[name] for name in modules}


def load(path: Path, derived: Derived, kind: str):
    """The student with the LoRA, by the stock loader of its pipeline."""
    student = make_unet(derived.student_config)
    cls = pipeline_of(kind)
    state, alphas, metadata = cls.lora_state_dict(path, unet_config=student.config, return_lora_metadata=True)
    cls.load_lora_into_unet(state, network_alphas=alphas, unet=student, metadata=metadata)
    return student


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya", "sgm"])
@each_plan
def test_each_layer_of_a_lora_has_its_own_delta(plan, form, tmp_path, run) -> None:
    kind, derived = PLANS[plan], derived_of(plan)
    path, theirs = write_lora(tmp_path / "lora.safetensors", kind, form)
    facts = adapt(path, run(plan), tmp_path / "new.safetensors")
    ours = deltas(load(tmp_path / "new.safetensors", derived, kind))
    origins = {
        teacher_name(n, derived.form.module_map): n for n, _ in make_unet(derived.student_config).named_modules()
    }
    assert ours.keys() == {origins[name] for name in theirs if name in origins}
    for name, delta in ours.items():
        assert (delta - theirs[teacher_name(name, derived.form.module_map)]).abs().max() < 1e-6, name
    assert len(facts["kept"]) == len(ours) and len(facts["dropped"]) == len(theirs) - len(ours) > 0
    old, new = load_file(path), load_file(tmp_path / "new.safetensors")
    marks = {"peft": r"unet\..*\.lora_[AB]\.weight|text_encoder\..*", "diffusers": r"unet\..*\.lora\.(down|up)\.weight"}
    pattern = marks.get(form, r"lora_unet_\w+\.(lora_(down|up)\.weight|alpha)")
    assert all(re.fullmatch(pattern, key) for key in (*old, *new))
    text = [key for key in old if key.startswith("text_encoder")]
    assert bool(text) == (form == "peft") and all(torch.equal(old[key], new[key]) for key in text)
