"""Where a student works: what prunet reports for a plan equals what stock diffusers does with the student."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SMALL_UNETS
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
    UNetMotionModel,
)

from prunet import Teacher, build, derive, load_plan
from prunet.denoisers.unet2d.form import make_unet
from prunet.denoisers.unet2d.inputs import example_inputs
from prunet.exports.card import model_card
from prunet.plan.derived import Derived
from prunet.plan.plan import Plan, preset_names
from prunet.teacher.known import layout_config

UNEVEN = ["down_blocks.1.{resnets,attentions}.1", "up_blocks.2.{resnets,attentions}.1"]
PLANS = {
    "sd": {"none": [], "bk-base": "bk-base", "bk-small": "bk-small", "bk-tiny": "bk-tiny", "mid": ["mid_block"]},
    "sdxl": {"vega": "vega"},
    "sdxl_deep": {"koala-1b": "koala-1b"},
}
CASES = [(kind, name) for kind, plans in PLANS.items() for name in plans]
each_case = pytest.mark.parametrize(("kind", "name"), CASES)


def derived_of(kind: str, plan) -> Derived:
    return derive(make_unet(SMALL_UNETS[kind]).config, load_plan(plan) if plan else Plan("none"))


@cache
def nets(kind: str, name: str):
    """Plan, teacher and student; small, random."""
    torch.manual_seed(0)
    derived = derived_of(kind, PLANS[kind][name])
    return derived, make_unet(derived.teacher_config).eval(), make_unet(derived.student_config).eval()


@cache
def full(layout: str, plan: str | None) -> Derived:
    return derive(layout_config(layout), load_plan(plan) if plan else Plan("none"))


def inputs_of(net) -> dict:
    return example_inputs(dict(net.config), latent_size=(8, 8))


@torch.no_grad()
def controlled(net, controlnet) -> torch.Tensor:
    inputs = inputs_of(net)
    picture = torch.ones(1, 3, 64, 64)
    down, mid = controlnet(**inputs, controlnet_cond=picture, return_dict=False)
    residuals = {"down_block_additional_residuals": [d + 1 for d in down], "mid_block_additional_residual": mid + 1}
    return net(**inputs, **residuals).sample


def outcome(call) -> str:
    try:
        call()
    except Exception:  # whatever diffusers raises
        return "no"
    return "yes"


@each_case
def test_the_teachers_controlnet(kind, name) -> None:
    derived, teacher, student = nets(kind, name)
    said = derived.works_with["the teacher's ControlNet"]
    assert outcome(lambda: controlled(student, ControlNetModel.from_unet(teacher))) == said.split(":")[0]
    assert (said == "yes") == (name in ("none", "mid", "vega"))


@each_case
def test_a_controlnet_of_its_own(kind, name) -> None:
    derived, _, student = nets(kind, name)
    said = derived.works_with["a ControlNet of its own"]
    assert outcome(lambda: controlled(student, ControlNetModel.from_unet(student))) == said.split(":")[0]
    assert (said == "yes") == (student.mid_block is not None)


def test_no_controlnet_has_uneven_stages() -> None:
    derived = derived_of("sd", UNEVEN)
    assert derived.works_with["a ControlNet of its own"].startswith("no: diffusers has no ControlNet with")
    assert outcome(lambda: ControlNetModel.from_unet(make_unet(derived.student_config))) == "no"


def motion_adapter(config) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=config["block_out_channels"],
        motion_layers_per_block=config["layers_per_block"],
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    )


@pytest.mark.parametrize("name", PLANS["sd"])
def test_the_teachers_animatediff(name) -> None:
    derived, teacher, student = nets("sd", name)
    adapter = motion_adapter(teacher.config)
    assert outcome(lambda: UNetMotionModel.from_unet2d(teacher, adapter)) == "yes"
    said = derived.works_with["the teacher's AnimateDiff"]
    assert outcome(lambda: UNetMotionModel.from_unet2d(student, adapter)) == said.split(":")[0]


@each_case
def test_the_default_layer_of_pag(kind, name, request) -> None:
    derived, _, student = nets(kind, name)
    cls = StableDiffusionPAGPipeline if kind == "sd" else StableDiffusionXLPAGPipeline
    stock = DiffusionPipeline.from_pretrained(request.getfixturevalue(kind), unet=student)
    more = {"safety_checker": None, "feature_extractor": None} if kind == "sd" else {}
    parts = {part: value for part, value in stock.components.items() if part not in more}
    pipe = cls(**parts, **more)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> None:
        pipe("a", num_inference_steps=1, height=16, width=16, pag_scale=1.0, output_type="latent")

    assert outcome(draw) == derived.works_with["PAG's default layer"].split(":")[0]
    if name == "bk-tiny":  # the advice of the docs
        pipe.set_pag_applied_layers(["down_blocks.1"])
        assert outcome(draw) == "yes"


def ip_adapter(teacher) -> dict:
    """Image keys for the teacher's cross-attentions; each is filled with its number."""
    state = {}
    names = [name for name in teacher.attn_processors if ".attn2." in name]
    for i, name in enumerate(names):
        module = teacher.get_submodule(name.removesuffix(".processor"))
        for kind in "kv":
            shape = module.inner_dim, module.cross_attention_dim
            state[f"{2 * i + 1}.to_{kind}_ip.weight"] = torch.full(shape, float(i))
    width = teacher.config.cross_attention_dim
    projection = {"proj.weight": torch.ones(4 * width, 8), "proj.bias": torch.ones(4 * width)}
    return {
        "ip_adapter": state,
        "image_proj": {**projection, "norm.weight": torch.ones(width), "norm.bias": torch.ones(width)},
    }


@each_case
def test_the_teachers_ip_adapter(kind, name) -> None:
    """Stock diffusers loads it into the student; each layer should get what it had in the teacher."""
    derived, teacher, _ = nets(kind, name)
    student = make_unet(derived.student_config)
    theirs = [layer for layer in teacher.attn_processors if ".attn2." in layer]
    ours = [layer for layer in student.attn_processors if ".attn2." in layer]
    wanted = {
        layer: float(
            theirs.index(
                derived.weight_map[layer.replace("processor", "to_q.weight")].replace("to_q.weight", "processor")
            )
        )
        for layer in ours
    }

    def load() -> None:
        student._load_ip_adapter_weights([ip_adapter(teacher)])
        for layer, number in wanted.items():
            assert torch.all(student.attn_processors[layer].to_k_ip[0].weight == number)

    said = derived.works_with["the teacher's IP-Adapter"]
    assert outcome(load) == said.split(":")[0]
    assert (said == "yes") == (name in ("none", "mid"))


@pytest.mark.parametrize(("kind", "name"), [("sd", "bk-base"), ("sd", "bk-tiny"), ("sdxl", "vega")])
def test_the_teachers_lora(kind, name, request) -> None:
    """A layer gets another one's delta if the teacher's layer of its name is not the one that it came from."""
    teacher = Teacher(request.getfixturevalue(kind))
    plan = load_plan(name)
    theirs, ours = teacher.unet.state_dict(), build(teacher, plan).state_dict()
    layers = [key for key in ours if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))]
    wrong = [key for key in layers if key in theirs and not torch.equal(ours[key], theirs[key])]
    said = derive(teacher.unet_config, plan).works_with["the teacher's LoRA"]
    assert said.startswith(f"no: {len(wrong)} of {len(layers)} attention layers") if wrong else said == "yes"
    assert bool(wrong) == (name != "vega")


def test_what_is_said_of_models_of_full_size() -> None:
    """stable-diffusion.cpp, the teacher's ControlNet, and how many attention layers a LoRA would get wrong."""
    whole, tiny = "no: it knows only the whole", "yes: with --for sd.cpp"
    for layout, plan, cpp, controlnet, wrong in (
        ("sd-v1", None, "yes", "yes", ""),
        ("sd-v2", None, "yes", "yes", ""),
        ("sdxl", None, "yes", "yes", ""),
        ("sdxl", "ssd-1b", "yes", "yes", "32 of 272"),
        ("sdxl", "vega", "yes", "yes", ""),
        ("sd-v1", "bk-base", whole, "no", "24 of 80"),
        ("sd-v1", "bk-small", whole, "no", "24 of 72"),
        ("sd-v2", "bk-tiny", tiny, "no", "32 of 72"),
        ("sdxl", "koala-700m", whole, "no", "56 of 168"),
    ):
        derived = full(layout, plan)
        assert derived.loads_in["stable-diffusion.cpp, single file"].startswith(cpp), plan
        assert derived.works_with["the teacher's ControlNet"].startswith(controlnet), plan
        lora = derived.works_with["the teacher's LoRA"]
        assert lora.startswith(f"no: {wrong} attention layers") if wrong else lora == "yes", plan
    assert derived_of("sd", []).loads_in["stable-diffusion.cpp, single file"].startswith("no: not the widths")


def test_the_card_says_it() -> None:
    derived = derived_of("sd", "bk-small")
    facts = {"teacher": "a/b", "loads_in": derived.loads_in, "works_with": derived.works_with}
    rows = [line for line in model_card(facts).splitlines() if line.startswith("|")]
    for name, answer in {**derived.loads_in, **derived.works_with}.items():
        assert f"| {name} | {answer} |" in rows
    assert "Where it works" not in model_card({"teacher": "a/b"})


def test_the_tables_of_the_docs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    checked = 0
    for header, _, *rows in tables:
        columns = [
            [name for name in preset_names() if name in re.split(r"[ ,:]+", cell)] for cell in header.split("|")[2:-1]
        ]
        for name, *cells in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows):
            for plans, cell in zip(columns, cells, strict=True):
                for plan in plans:
                    derived = full("sd-v1" if plan.startswith("bk") else "sdxl", plan)
                    answers = {"diffusers, folder": "yes", **derived.loads_in, **derived.works_with}
                    key = re.sub(r" \(.*\)|, as it is", "", name)
                    assert answers[key].split(":")[0] == cell, (plan, name)
                    checked += 1
    assert checked == 4 * 7 + 6 * 7
