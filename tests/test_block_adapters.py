"""LoRAs and ControlNets of transformers, carried over to their students and loaded by stock diffusers."""

import importlib.util
import inspect
import re
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_adapters import deltas
from test_blocks import SMALL, becomes_identity, config_of, filled
from torch import Tensor, nn

from prunet import UserError, adapt, derive, load_plan
from prunet.denoisers.form import teacher_name
from prunet.denoisers.known import architecture_of
from prunet.plan.derived import Derived

LISTS = ("transformer_blocks", "single_transformer_blocks")
LORAS = ("FluxTransformer2DModel", "SD3Transformer2DModel")
#: Class -> lengths of its ControlNet, the arguments that take its residuals, a plan that keeps the first blocks.
CONTROLNETS: dict[str, tuple[dict[str, int], tuple[str, ...], list[str]]] = {
    "FluxTransformer2DModel": (
        {"num_layers": 2, "num_single_layers": 2},
        ("controlnet_block_samples", "controlnet_single_block_samples"),
        ["transformer_blocks.[12]", "single_transformer_blocks.{1,2}"],
    ),
    "SD3Transformer2DModel": ({"num_layers": 3}, ("block_controlnet_hidden_states",), ["transformer_blocks.{1,3}"]),
    "QwenImageTransformer2DModel": ({"num_layers": 2}, ("controlnet_block_samples",), ["transformer_blocks.[12]"]),
}


def derived_of(name: str, plan: Any = None) -> Derived:
    return derive(config_of(name), load_plan(plan or SMALL[name][1]))


def run_of(derived: Derived, folder: Path) -> Path:
    """Makes the part of a run's folder that `adapt` reads."""
    folder.mkdir()
    derived.result().save(folder / "plan.json")
    return folder


def model(name: str, config: dict[str, Any]) -> Any:
    """A model with random weights that differ from block to block."""
    rng = torch.Generator().manual_seed(0)
    net = getattr(diffusers, name)(**{key: value for key, value in config.items() if not key.startswith("_")})
    for key, p in net.named_parameters():
        is_scale = p.ndim == 1 and "norm" in key and key.endswith("weight")
        p.data.copy_(is_scale + (0.3 if p.ndim == 1 else 0.08) * torch.randn(p.shape, generator=rng))
    return net.eval().requires_grad_(False)


def trained(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A teacher's LoRA of every linear layer in a block: the layers' deltas, and its weights as PEFT has them."""
    torch.manual_seed(0)
    teacher = model(name, config_of(name))
    blocks = [f"{part}." for part in architecture_of(config_of(name)).parts(config_of(name))]
    linear = [key for key, module in teacher.named_modules() if isinstance(module, nn.Linear)]
    targets = [key for key in linear if key.startswith(tuple(blocks))]
    teacher.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    return deltas(teacher), get_peft_model_state_dict(teacher)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "peft") for name in SMALL if hasattr(getattr(diffusers, name), "add_adapter")),
        *product(LORAS, ("diffusers", "kohya")),
    ],
)
def test_each_layer_of_a_lora_has_its_own_delta(name, form, tmp_path) -> None:
    derived, (theirs, state) = derived_of(name), trained(name)
    old = {key: value.contiguous() for key, value in state.items()}
    if form == "diffusers":  # attentions only: the stock loader reads no other layers of this format
        old = {key: value for key, value in old.items() if re.search(r"\.to_(q|k|v|out\.0)\.", key)}
        theirs = {layer: delta for layer, delta in theirs.items() if f"{layer}.lora_A.weight" in old}
        old = {key: value.contiguous() for key, value in convert_state_dict_to_diffusers(dict(old)).items()}
    old = {f"transformer.{key}": value for key, value in old.items()}
    if form == "kohya":
        sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
        parts = [(*key.removeprefix("transformer.").rsplit(".", 2), value) for key, value in old.items()]
        old = {f"lora_transformer_{layer.replace('.', '_')}.{sides[side]}.weight": v for layer, side, _, v in parts}
    save_file(old, tmp_path / "lora.safetensors")
    facts = adapt(tmp_path / "lora.safetensors", run_of(derived, tmp_path / "run"), tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    student = model(name, derived.student_config)
    student.load_lora_adapter(
        as_peft(new, student) if form == "kohya" else new, prefix=None if form == "kohya" else "transformer"
    )
    ours = deltas(student)
    assert ours.keys() == {
        layer for layer, _ in student.named_modules() if teacher_name(layer, derived.form.module_map) in theirs
    }
    for layer, delta in ours.items():
        assert (delta - theirs[teacher_name(layer, derived.form.module_map)]).abs().max() < 1e-6, layer
    assert len(facts["kept"]) == len(ours) and len(facts["dropped"]) == len(theirs) - len(ours) > 0


def as_peft(kohya: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Translates kohya's names to PEFT's by the module names: stock diffusers reads kohya's for few transformers."""
    names = {layer.replace(".", "_"): layer for layer, _ in net.named_modules()}
    sides = {"lora_down": "lora_A", "lora_up": "lora_B"}
    parts = [(*key.removeprefix("lora_transformer_").split("."), value) for key, value in kohya.items()]
    return {f"{names[layer]}.{sides[side]}.{end}": value for layer, side, end, value in parts}


def controlnet(name: str, **fields: Any) -> Any:
    """A ControlNet of the small teacher whose residuals all differ."""
    cls = getattr(diffusers, str(architecture_of(config_of(name)).adapters.controlnet))
    config = {**config_of(name), **CONTROLNETS[name][0], **fields}
    return model(
        cls.__name__, {key: config[key] for key in config if key in inspect.signature(cls.__init__).parameters}
    )


def inputs_of(name: str) -> dict[str, Any]:
    example = architecture_of(config_of(name)).example_inputs(config_of(name), latent_size=(8, 8))
    return filled(example, torch.Generator().manual_seed(1))


def steer(net: Any, control: Any, name: str) -> tuple[Tensor, Any]:
    """Returns the outputs of a transformer with a ControlNet and of the ControlNet, called as in the pipelines."""
    given = inputs_of(name)
    found = control(**given, controlnet_cond=given["hidden_states"].flip(0, 1), return_dict=False)
    listed = [found] if torch.is_tensor(found[0]) else found
    return net(**given, **dict(zip(CONTROLNETS[name][1], listed, strict=True)), return_dict=False)[0], found


@pytest.mark.parametrize("name", CONTROLNETS)
@torch.no_grad()
def test_a_controlnet_steers_the_student_as_the_teacher_without_those_blocks(name, tmp_path) -> None:
    plan = CONTROLNETS[name][2]
    derived = derived_of(name, plan)
    control = controlnet(name)
    control.save_pretrained(tmp_path / "control")
    facts = adapt(tmp_path / "control", run_of(derived, tmp_path / "run"), tmp_path / "new")
    assert facts["form"] == "whole" and not facts["fits_unchanged"]
    spec = importlib.util.spec_from_file_location("student_controlnet", tmp_path / "new" / "student_controlnet.py")
    assert spec and spec.loader and "prunet" not in (tmp_path / "new" / "student_controlnet.py").read_text()
    spec.loader.exec_module(loaded := importlib.util.module_from_spec(spec))
    ours = loaded.StudentControlNet.from_pretrained(tmp_path / "new").eval()
    assert isinstance(ours, type(control))  # the pipelines check this

    teacher = model(name, config_of(name))
    whole = steer(teacher, control, name)[0]
    student = model(name, derived.student_config)
    weights = teacher.state_dict()
    student.load_state_dict({ours: weights[theirs] for ours, theirs in derived.form.weight_map.items()})
    for part in derived.removed:
        becomes_identity(teacher.get_submodule(part))
    wanted, steered = steer(teacher, control, name)[0], steer(student, ours, name)[0]
    assert (steered - wanted).abs().max() < 1e-5 < 1e-2 < (wanted - whole).abs().max()
    as_it_is = steer(student, control, name)[0]
    assert (as_it_is - wanted).abs().max() > 1e-3
    named = ours(**inputs_of(name), controlnet_cond=inputs_of(name)["hidden_states"])
    lists = list(named.values())
    assert all(len(one) == len(student.get_submodule(where)) for one, where in zip(lists, LISTS, strict=False))


def test_a_transformers_ip_adapter_is_refused(tmp_path) -> None:
    run = run_of(derived_of("FluxTransformer2DModel"), tmp_path / "run")
    save_file({"image_proj.weight": torch.ones(2)}, tmp_path / "ip.safetensors")
    with pytest.raises(UserError, match="no IP-Adapter of a FluxTransformer2DModel: give a LoRA or a ControlNet"):
        adapt(tmp_path / "ip.safetensors", run)
