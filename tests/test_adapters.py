"""The teacher's LoRA, IP-Adapter and ControlNet on its students: carried over, and loaded by stock diffusers."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SMALL_UNETS
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunet import UserError, adapt, cli, convert, derive, load_plan
from prunet.adapters import lora_file
from prunet.adapters.adapt import MARK
from prunet.adapters.lora_file import PERSONALIZED
from prunet.denoisers.architecture import ATTENTION_LAYERS
from prunet.denoisers.form import teacher_name
from prunet.denoisers.unet2d.form import make_unet
from prunet.denoisers.unet2d.student_controlnet import StudentControlNet
from prunet.plan.derived import Derived
from prunet.plan.plan import Plan

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
EVERYWHERE = ["to_k", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"]


@cache
def derived_of(plan: str) -> Derived:
    return derive(make_unet(SMALL_UNETS[PLANS[plan]]).config, load_plan(plan))


@pytest.fixture
def run(tmp_path):
    """Makes the part of a run's folder that `adapt` reads."""

    def make(plan: str | Derived) -> Path:
        folder = tmp_path / f"run-{plan if isinstance(plan, str) else 'own'}"
        folder.mkdir(exist_ok=True)
        (derived_of(plan) if isinstance(plan, str) else plan).result().save(folder / "plan.json")
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
        out[f"{name}.alpha"] = torch.tensor(6.0)  # if they differ, stock diffusers uses the most frequent one for all
    return out


def sgm(state, layers: int) -> dict[str, Tensor]:
    """kohya's names of SDXL, by its own rule: input_blocks and output_blocks counted through all levels."""
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
    if form in ("diffusers", "sgm"):  # attentions only: the stock loader reads no other layers of these formats
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
    """Returns the student with the LoRA, loaded by the stock loader of its pipeline."""
    student = make_unet(derived.student_config)
    cls = pipeline_of(kind)
    state, alphas, metadata = cls.lora_state_dict(path, unet_config=student.config, return_lora_metadata=True)
    cls.load_lora_into_unet(state, network_alphas=alphas, unet=student, metadata=metadata)
    return student


def test_names_of_the_original_layout_where_diffusers_cannot_read_them(tmp_path, run) -> None:
    """It computes with the number of layers of a level, which is a list for plans that leave levels uneven."""
    removed = ("down_blocks.1.{resnets,attentions}.1", "up_blocks.1.{resnets,attentions}.1")
    derived = derive(make_unet(SMALL_UNETS["sdxl"]).config, Plan("uneven", removed))
    assert isinstance(derived.student_config["layers_per_block"], list)
    path, theirs = write_lora(tmp_path / "lora.safetensors", "sdxl", "sgm")
    adapt(path, run(derived), tmp_path / "new.safetensors")
    ours = deltas(load(tmp_path / "new.safetensors", derived, "sdxl"))
    assert len(ours) > 20
    for name, delta in ours.items():
        assert (delta - theirs[teacher_name(name, derived.form.module_map)]).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("plan", "form"),
    [(plan, "peft") for plan in PLANS]
    + [(plan, form) for plan in ("bk-tiny", "ssd-1b", "koala-700m") for form in ("diffusers", "kohya", "sgm")],
)
def test_each_layer_of_a_lora_has_its_own_delta(plan, form, tmp_path, run) -> None:
    kind, derived = PLANS[plan], derived_of(plan)
    path, theirs = write_lora(tmp_path / "lora.safetensors", kind, form)
    facts = adapt(path, run(plan), tmp_path / "new.safetensors")
    ours = deltas(load(tmp_path / "new.safetensors", derived, kind))
    modules = derived.architecture.module_names(derived.student_config)
    origins = {teacher_name(name, derived.form.module_map): name for name in modules}
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


def test_a_carried_lora_changes_the_picture_as_patched_by_hand(sd, run, tmp_path) -> None:
    """Through the pipeline's own `load_lora_weights`, which must find every layer, and by adding the deltas."""
    path, theirs = write_lora(tmp_path / "lora.safetensors", "sd", "peft")
    layers = {key: value for key, value in load_file(path).items() if key.startswith("unet.")}
    metadata = {k: v for k, v in json.loads(read_metadata(path)["lora_adapter_metadata"]).items() if "text" not in k}
    save_file(layers, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    derived = derived_of("bk-small")
    written = adapt(path, run("bk-small"))["output"]
    assert written == str(tmp_path / "lora-run-bk-small.safetensors")
    student = make_unet(derived.student_config).eval()
    inputs = derived.architecture.example_inputs(derived.student_config)
    inputs["sample"] += torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    patched = make_unet(derived.student_config).eval()
    patched.load_state_dict(student.state_dict())
    with torch.no_grad():
        for name, module in patched.named_modules():
            if (origin := teacher_name(name, derived.form.module_map)) in theirs:
                module.weight += theirs[origin]
        before, by_hand = student(**inputs).sample, patched(**inputs).sample
        pipe = StableDiffusionPipeline.from_pretrained(sd, unet=student)
        pipe.load_lora_weights(written)
        after = pipe.unet(**inputs).sample
    assert (after - by_hand).abs().max() < 1e-5 < 1e-2 < (after - before).abs().max()


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_metadata_of_a_carried_file(tmp_path, run) -> None:
    path, _ = write_lora(tmp_path / "lora.safetensors", "sd", "kohya")
    once, twice = tmp_path / "new.safetensors", tmp_path / "twice.safetensors"
    adapt(path, run("bk-tiny"), once)
    said = read_metadata(once)
    assert json.loads(said[MARK]) == {"run": "run-bk-tiny", "plan": "bk-tiny", "from": "lora.safetensors"}
    assert said["ss_network_dim"] == "4" and "sshs_model_hash" not in said  # it is another file now
    adapt(path, run("bk-tiny"), once)  # it may replace its own file
    with pytest.raises(UserError, match="carried over to a student already"):
        adapt(once, run("bk-tiny"), twice)
    with pytest.raises(UserError, match="not an unchanged carried adapter"):
        adapt(path, run("bk-tiny"), write_lora(tmp_path / "mine.safetensors", "sd", "kohya")[0])


def test_a_lora_that_was_trained_on_a_student_is_refused(tmp_path, run) -> None:
    derived, paths = derived_of("bk-small"), []
    for net in (derived.teacher_skeleton, derived.student_skeleton):
        shapes = {name: layer.weight.shape for name, layer in net.named_modules() if name.endswith(ATTENTION_LAYERS)}
        layers = {name: (torch.ones(2, width), torch.ones(height, 2)) for name, (height, width) in shapes.items()}
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        about = {PERSONALIZED: json.dumps({"model": "mine", "prompt": "sks dog"})}
        lora_file.write_lora(layers, paths[-1], "unet", about)
    assert adapt(paths[0], run("bk-small"), tmp_path / "new.safetensors")["dropped"]
    with pytest.raises(UserError, match=r"trained on a student \(mine\), not on the teacher: load it on that"):
        adapt(paths[1], run("bk-small"), tmp_path / "newer.safetensors")


# -- IP-Adapter


def ip_adapter(kind: str, face: bool = False) -> dict[str, Tensor]:
    """A stock file for the teacher, named as diffusers loads it; each tensor is filled with its attention's number."""
    unet = make_unet(SMALL_UNETS[kind])
    width = unet.config.cross_attention_dim
    state = {"image_proj.proj.weight": torch.ones(4 * width, 8), "image_proj.proj.bias": torch.ones(4 * width)}
    state |= {"image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.ones(width)}
    for number, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        layers = {layer: attention.get_submodule(layer).weight.shape for layer in ("to_q", "to_k", "to_v", "to_out.0")}
        if ".attn2." in name:
            for layer in ("to_k", "to_v"):
                state[f"ip_adapter.{number}.{layer}_ip.weight"] = torch.full(layers[layer], float(number))
        for layer, (out, inside) in layers.items() if face else ():
            side = f"ip_adapter.{number}.{layer.removesuffix('.0')}_lora"
            state |= {f"{side}.down.weight": torch.full((2, inside), float(number))}
            state |= {f"{side}.up.weight": torch.ones(out, 2)}
    return state


@each_plan
def test_each_attention_gets_its_own_image_keys(plan, tmp_path, run) -> None:
    derived, face = derived_of(plan), plan == "bk-small"
    save_file(ip_adapter(PLANS[plan], face), tmp_path / "ip.safetensors", metadata={"a": "b"})
    facts = adapt(tmp_path / "ip.safetensors", run(plan), tmp_path / "new.safetensors")
    assert read_metadata(tmp_path / "new.safetensors").keys() == {"a", MARK}
    state: dict = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(tmp_path / "new.safetensors").items():
        part, _, name = key.partition(".")
        state[part][name] = value
    student = make_unet(derived.student_config)
    teacher = make_unet(derived.teacher_config)
    origin = {
        name: list(teacher.attn_processors).index(teacher_name(name, derived.form.module_map))
        for name in student.attn_processors
    }
    student._load_ip_adapter_weights([state])
    crossed = [name for name in student.attn_processors if ".attn2." in name]
    for name in crossed:
        processor = student.attn_processors[name]
        assert (processor.to_k_ip[0].weight == origin[name]).all() and (
            processor.to_v_ip[0].weight == origin[name]
        ).all()
    assert len(facts["kept"]) == len(crossed)
    assert len(facts["kept"]) + len(facts["dropped"]) == sum(".attn2." in name for name in teacher.attn_processors)
    if face:
        loras = student._load_ip_adapter_loras([state])[0]
        for name, number in origin.items():
            assert (loras[f"unet.{name}.to_out_lora.down.weight"] == number).all()


# -- ControlNet


@cache
def controlnet(kind: str) -> ControlNetModel:
    """A ControlNet of a teacher, with residuals that are not zero."""
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(make_unet(SMALL_UNETS[kind]), conditioning_embedding_out_channels=(4, 8))
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
        torch.nn.init.normal_(block.bias, std=0.1)
    return control.eval().requires_grad_(False)


def control_inputs(derived: Derived) -> dict:
    noise = torch.Generator().manual_seed(1)
    inputs = derived.architecture.example_inputs(derived.teacher_config)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=noise)
    inputs["encoder_hidden_states"] = torch.randn(inputs["encoder_hidden_states"].shape, generator=noise)
    return inputs


def picture() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def patch_out(control: ControlNetModel, removed) -> None:
    """Makes the blocks that a plan removes return their input."""
    modules = dict(control.named_modules())
    for name in removed:
        if name in modules and not name.startswith("up_blocks"):
            is_attention = name.split(".")[-2] == "attentions"
            give = (lambda hidden, *_, **__: (hidden,)) if is_attention else (lambda hidden, *_, **__: hidden)
            modules[name].forward = give


#: Places of the residuals that a student takes of those of its teacher.
TAKEN = {
    "bk-base": [0, 1, 3, 4, 6, 7, 9, 10],
    "bk-small": [0, 1, 3, 4, 6, 7, 9, 10],
    "bk-tiny": [0, 1, 3, 4, 6, 7],
    "ssd-1b": list(range(9)),
    "vega": list(range(9)),
    "koala-1b": [0, 1, 3, 4, 6, 7],
    "koala-700m": [0, 1, 3, 4, 6, 7],
}


@torch.no_grad()
@each_plan
def test_a_controlnet_equals_the_teachers_without_the_removed_blocks(plan, tmp_path, run) -> None:
    derived, folder, out = derived_of(plan), tmp_path / "control", tmp_path / "new"
    control = controlnet(PLANS[plan])
    control.save_pretrained(folder)
    facts = adapt(folder, run(plan), out)
    inputs = control_inputs(derived)
    whole = derived.student_config["mid_block_type"] is None
    assert facts["form"] == ("whole" if whole else "cut")
    assert facts["fits_unchanged"] == (plan in ("ssd-1b", "vega"))
    ours = (StudentControlNet if whole else ControlNetModel).from_pretrained(out).eval()
    down, mid = ours(**inputs, controlnet_cond=picture(), return_dict=False)
    patched = ControlNetModel.from_pretrained(folder).eval()
    if not whole:
        patch_out(patched, derived.removed)
    theirs, their_mid = patched(**inputs, controlnet_cond=picture(), return_dict=False)
    assert len(down) == len(TAKEN[plan]) and len({float(residual.mean()) for residual in theirs}) == len(theirs)
    for residual, place in zip(down, TAKEN[plan], strict=True):
        assert (residual - theirs[place]).abs().max() < 1e-5  # but for rounding
    has_mid = plan != "bk-tiny"  # bk-tiny's last level is not the teacher's, and diffusers would add the residual there
    assert (mid - their_mid).abs().max() < 1e-5 if has_mid else not mid.any()
    student = make_unet(derived.student_config)
    steered = student(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert steered.isfinite().all() and not torch.equal(steered, student(**inputs).sample)


def test_the_loader_beside_a_whole_controlnet_needs_no_prunet(sd, tmp_path, run) -> None:
    controlnet("sd").save_pretrained(tmp_path / "control")
    adapt(tmp_path / "control", run("bk-tiny"), tmp_path / "new")
    text = (tmp_path / "new" / "student_controlnet.py").read_text()
    assert "prunet" not in text
    scope: dict = {"__name__": "student_controlnet"}
    exec(text, scope)
    control = scope["StudentControlNet"].from_pretrained(tmp_path / "new")
    student = make_unet(derived_of("bk-tiny").student_config)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(sd, unet=student, controlnet=control)
    options = {"image": picture(), "num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}
    for guess in (False, True):  # which doubles the residuals
        assert pipe("a", guess_mode=guess, **options).images.shape == (1, 16, 16, 3)


# -- what is refused


def lora_with(path: Path, **tensors) -> Path:
    """Writes kohya's file of one layer of the small SD teacher, with changes."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{name}.lora_down.weight": torch.ones(4, 32, 1, 1), f"{name}.lora_up.weight": torch.ones(32, 4, 1, 1)}
    state |= {f"{name}.{key.replace('__', '.')}": value for key, value in tensors.items()}
    save_file({key: value for key, value in state.items() if value is not None}, path)
    return path


def other_model(path: Path) -> Path:
    return write_lora(path, "sdxl", "sgm")[0]


def peft_metadata(text: str):
    def make(path: Path) -> Path:
        state = load_file(write_lora(path, "sd", "peft")[0])
        save_file(state, path, metadata={"lora_adapter_metadata": text})
        return path

    return make


def torn(path: Path) -> Path:
    path.write_bytes(b"x" * 100)
    return path


def saved(**tensors):
    def make(path: Path) -> Path:
        save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)
        return path

    return make


IP = "ip_adapter.1.to_k_ip.weight"
REFUSED = {
    "no file": (lambda path: path, "no such file"),
    "a pickle": (lambda path: torn(path.with_suffix(".bin")), "`prunet convert"),
    "no safetensors": (torn, "cut off, damaged"),
    "no adapter": (saved(a__weight=torch.ones(2)), r"are not those of an adapter \(the first is a.weight\)"),
    "a whole model": (saved(conv_in__weight=torch.ones(2), conv_in__bias=torch.ones(2)), "are not those of an adapter"),
    "of SDXL": (other_model, "for the student's teacher"),
    "DoRA": (lambda path: lora_with(path, dora_scale=torch.ones(32)), "belongs to DoRA"),
    "LoKr": (lambda path: lora_with(path, lokr_w1=torch.ones(2)), "belongs to LoKr"),
    "LoHa": (lambda path: lora_with(path, hada_w1_a=torch.ones(2)), "belongs to LoHa"),
    "biases": (lambda path: lora_with(path, lora_B__bias=torch.ones(2)), "belongs to a LoRA with biases"),
    "PEFT's DoRA": (peft_metadata('{"unet.use_dora": 1, "unet.lora_alpha": 4}'), "have use_dora"),
    "no alpha": (peft_metadata('{"unet.lora_alpha": null}'), "not a config of PEFT"),
    "no config": (peft_metadata("[1]"), "not a config of PEFT"),
    "half a layer": (lambda path: lora_with(path, lora_up__weight=None), "its up is missing"),
    "another width": (
        lambda path: lora_with(path, lora_up__weight=torch.ones(16, 4, 1, 1)),
        "do not fit the teacher's",
    ),
    "NaN": (lambda path: lora_with(path, alpha=torch.tensor(float("nan"))), "NaN or infinity"),
    "integers": (
        lambda path: lora_with(path, lora_up__weight=torch.ones(32, 4, 1, 1, dtype=torch.int8)),
        "stored as I8",
    ),
    "more in it": (lambda path: lora_with(path, x=torch.ones(1)), "does not belong to a LoRA"),
    "text alone": (saved(lora_te_a__lora_up__weight=torch.ones(2, 2)), "only text encoders"),
    "no image keys": (saved(**{IP: torch.ones(16, 16)}), "no keys and values of the image"),
    "IP-Adapter of another": (saved(**{IP: torch.ones(16, 40)}), r"is \[16, 40\], its attention"),
    "too many attentions": (
        saved(**{IP.replace("1", "999"): torch.ones(2)}),
        "that the teacher does not have, out of 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_over_is_refused(case, tmp_path, run) -> None:
    make, words = REFUSED[case]
    path = make(tmp_path / "file.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as refusal:
        adapt(path, run("bk-base"), tmp_path / "new.safetensors")
    assert path.name in str(refusal.value)
    assert not (tmp_path / "new.safetensors").exists() and len(before) <= 2


def test_a_lora_of_removed_layers_alone_is_refused(tmp_path, run) -> None:
    with pytest.raises(UserError, match="all 1 layers that it changes are gone"):
        adapt(lora_with(tmp_path / "file.safetensors"), run("bk-tiny"), tmp_path / "new.safetensors")


def test_a_controlnet_of_another_model_is_refused(tmp_path, run) -> None:
    controlnet("sdxl").save_pretrained(tmp_path / "control")
    with pytest.raises(UserError, match="control: a ControlNet of another model: "):
        adapt(tmp_path / "control", run("bk-base"), tmp_path / "new")
    make_unet(SMALL_UNETS["sd"]).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="a UNet2DConditionModel: give a folder"):
        adapt(tmp_path / "unet", run("bk-base"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pickled_ip_adapter_opens_after_the_advised_conversion(tmp_path, run) -> None:
    state: dict = {"image_proj": {}, "ip_adapter": {}}
    for key, value in ip_adapter("sd").items():
        part, _, name = key.partition(".")
        state[part][name] = value
    torch.save(state, tmp_path / "ip.bin")
    with pytest.raises(UserError, match="`prunet convert"):
        adapt(tmp_path / "ip.bin", run("bk-base"))
    convert(tmp_path / "ip.bin")
    assert len(adapt(tmp_path / "ip.safetensors", run("bk-base"))["kept"]) == 10


def test_the_student_is_given_by_its_run(tmp_path, run) -> None:
    path = write_lora(tmp_path / "lora.safetensors", "sd", "kohya")[0]
    with pytest.raises(UserError, match=r"no plan.json there.*give the run folder.*--teacher and --plan"):
        adapt(path, tmp_path)
    plan = run("bk-base") / "plan.json"
    facts = json.loads(plan.read_text())
    del facts["checksum"], facts["weight_map"]["conv_in.weight"]
    plan.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="of another version of prunet"):
        adapt(path, plan.parent)


def test_the_command(finished, tmp_path, capsys, monkeypatch) -> None:
    """On a real run: what it prints, and one line of refusal."""
    path = write_lora(tmp_path / "style.safetensors", "sd", "kohya")[0]
    monkeypatch.setattr("sys.argv", ["prunet", "adapt", str(path), "--to", str(finished), "--json"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["plan"] == "bk-small" and facts["kind"] == "LoRA" and facts["output"].endswith("style-run.safetensors")
    monkeypatch.setattr("sys.argv", ["prunet", "adapt", str(path), "--to", str(finished)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    kept, dropped = len(facts["kept"]), facts["dropped"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"the LoRA for run (bk-small), {kept} of {kept + len(dropped)} layers")
    assert second == f"dropped, because their blocks are removed: {', '.join(dropped[:3])} and {len(dropped) - 3} more"
    monkeypatch.setattr("sys.argv", ["prunet", "adapt", facts["output"], "--to", str(finished)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_student_without_its_run(sd, finished, tmp_path, capsys, monkeypatch) -> None:
    """By teacher and plan a file is carried over as by the run; neither or both are refused."""
    path = write_lora(tmp_path / "style.safetensors", "sd", "kohya")[0]
    by_run = adapt(path, finished)
    teacher_and_plan = ["--teacher", str(sd), "--plan", "bk-small"]
    monkeypatch.setattr("sys.argv", ["prunet", "adapt", str(path), *teacher_and_plan, "--json"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    by_plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(by_plan["output"]).name == "style-bk-small.safetensors" and "run" not in by_plan
    assert [by_plan[key] for key in ("kept", "dropped")] == [by_run[key] for key in ("kept", "dropped")]
    one, other = load_file(by_run["output"]), load_file(by_plan["output"])
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for wrong in ([], teacher_and_plan[:2], teacher_and_plan[2:], ["--to", str(finished), *teacher_and_plan[2:]]):
        monkeypatch.setattr("sys.argv", ["prunet", "adapt", str(path), *wrong])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert "give either --to RUN, or both --teacher and --plan" in capsys.readouterr().err
