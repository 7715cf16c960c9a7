"""Plans against the published architectures, from configs alone."""

import re
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from prunet import Plan, UserError, derive, load_plan
from prunet.denoisers.patterns import expand, match
from prunet.denoisers.unet2d.architecture import UNET2D
from prunet.denoisers.unet2d.form import make_unet
from prunet.plan.effect import shipped_effect
from prunet.plan.plan import preset_names
from prunet.teacher.known import layout_config

# Parameters of the published students, and MACs (G) at the native size without and with attention's matmuls.
PUBLISHED = {
    ("sd-v1", "none"): (859_520_964, 338.6, 401.6),
    ("sd-v1", "bk-base"): (579_384_964, 223.7, 261.5),
    ("sd-v1", "bk-small"): (482_346_884, 217.6, 255.4),
    ("sd-v1", "bk-tiny"): (323_384_964, 205.0, 242.8),
    ("sd-v2", "none"): (865_910_724, 339.1, 402.1),
    ("sd-v2", "bk-base"): (583_480_964, 224.0, 261.8),
    ("sd-v2", "bk-small"): (485_787_524, 217.9, 255.7),
    ("sd-v2", "bk-tiny"): (326_825_604, 205.2, 243.0),
    ("sdxl", "none"): (2_567_463_684, 2989, 3380.6),
    ("sdxl", "ssd-1b"): (1_331_334_404, 1854, 2103.9),
    ("sdxl", "vega"): (745_225_604, 1273, 1411.2),
    ("sdxl", "koala-1b"): (1_161_184_324, 1515, 1715.9),
    ("sdxl", "koala-700m"): (782_822_724, 1176, 1350.8),
}


@cache
def plan_of(layout: str, name: str):
    return derive(layout_config(layout), Plan("none") if name == "none" else load_plan(name))


@pytest.mark.parametrize(("layout", "name"), PUBLISHED)
def test_size_is_the_published_one(layout: str, name: str) -> None:
    derived = plan_of(layout, name)
    size = derived.student_size
    parameters, macs, with_attention = PUBLISHED[layout, name]
    assert size.parameters == parameters
    assert size.macs / 1e9 == pytest.approx(macs, abs=0.5 if macs > 1000 else 0.05)
    assert (size.macs + size.attention_macs) / 1e9 == pytest.approx(with_attention, abs=0.06)
    assert shipped_effect(layout, name) == derived.effect(), "run: python tests/effects.py"


# What Nota published as the config of its three students; the rest are SD v1.4's own values.
NOTA = {
    "bk-base": {"layers_per_block": 1, "mid_block_type": "UNetMidBlock2DCrossAttn"},
    "bk-small": {"layers_per_block": 1, "mid_block_type": None},
    "bk-tiny": {
        "layers_per_block": 1,
        "mid_block_type": None,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
}


@pytest.mark.parametrize("layout", ["sd-v1", "sd-v2"])
@pytest.mark.parametrize("name", NOTA)
def test_bk_students_have_the_published_config_keys_and_shapes(layout: str, name: str) -> None:
    changed = dict(NOTA[name])
    if layout == "sd-v2" and name == "bk-tiny":
        changed["attention_head_dim"] = [5, 10, 20]
    published = layout_config(layout) | changed
    assert plan_of(layout, name).student_config == published
    with torch.device("meta"):
        expected = UNet2DConditionModel(**{k: v for k, v in published.items() if k != "_class_name"})
    ours = UNET2D.skeleton(plan_of(layout, name).student_config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_ssd_1b_has_the_published_config() -> None:
    config = plan_of("sdxl", "ssd-1b").student_config
    assert config["transformer_layers_per_block"] == [1, [2, 2], [4, 4]]
    assert config["reverse_transformer_layers_per_block"] == [[4, 4, 10], [2, 1, 1], 1]
    assert config["mid_block_type"] == "UNetMidBlock2D"


def published_origin(name: str, plan: str) -> str:
    """Nota's mapping, from its code: the third up layer becomes the second; in Tiny the up stages move by one."""
    found = re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", name)
    if not found:
        return name
    stage, kind, layer, rest = found.groups()
    stage = str(int(stage) + 1) if plan == "bk-tiny" else stage
    layer = "2" if kind != "upsamplers" and layer == "1" else layer
    return f"up_blocks.{stage}.{kind}.{layer}.{rest}"


@pytest.mark.parametrize("name", NOTA)
def test_weight_map_is_the_published_one(name: str) -> None:
    weight_map = plan_of("sd-v1", name).weight_map
    assert weight_map == {key: published_origin(key, name) for key in weight_map}


def test_ssd_1b_inherits_blocks_1_2_3_and_7_of_ten() -> None:
    weight_map = plan_of("sdxl", "ssd-1b").weight_map
    stem = "down_blocks.2.attentions.0.transformer_blocks.{}.norm1.weight"
    assert [weight_map[stem.format(i)] for i in range(4)] == [stem.format(i) for i in (0, 1, 2, 6)]


def test_pairs_of_bk_are_the_stages_and_never_the_mid() -> None:
    stages = [f"down_blocks.{i}" for i in range(4)] + [f"up_blocks.{i}" for i in range(4)]
    for name in ("bk-base", "bk-small"):
        assert [(p.student, p.teacher) for p in plan_of("sd-v1", name).pairs()] == [(s, s) for s in stages]


def test_pairs_of_bk_tiny_are_not_its_weight_map() -> None:
    derived = plan_of("sd-v1", "bk-tiny")
    assert [(p.teacher, p.student) for p in derived.pairs()] == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ]
    inherited = derived.weight_map["down_blocks.2.attentions.0.proj_out.weight"]
    assert inherited == "down_blocks.2.attentions.0.proj_out.weight"
    assert derived.form.implied == ("down_blocks.2.downsamplers",)


def test_mid_block_stays_removed_although_the_teacher_held_the_default() -> None:
    """`from_config({**config, "mid_block_type": None})` brings the mid block back."""
    assert make_unet(plan_of("sd-v1", "bk-small").student_config | SMALL).mid_block is None


SMALL = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8}


def test_empty_plan_is_the_teacher() -> None:
    for layout in ("sd-v1", "sd-v2", "sdxl"):
        derived = plan_of(layout, "none")
        assert derived.student_config == layout_config(layout)
        assert all(a == b for a, b in derived.weight_map.items())


PROGRAMS = ("diffusers", "diffusers, single file", "ComfyUI, single file")


def test_every_preset_fits_a_layout_and_says_where_it_loads() -> None:
    of_transformers = {"flux-lite", "flux-mini", "amber-10b"}  # in test_blocks.py
    for name in set(preset_names()) - of_transformers:
        layout = "sd-v1" if name.startswith("bk") else "sdxl"
        loads_in = plan_of(layout, name).loads_in
        assert {program: loads_in[program] for program in PROGRAMS} == dict.fromkeys(PROGRAMS, "yes")


def test_sdxl_student_that_comfyui_does_not_know_says_so() -> None:
    plan = load_plan(["down_blocks.2.attentions.*.transformer_blocks.9", "mid_block"])
    assert derive(layout_config("sdxl"), plan).loads_in["ComfyUI, single file"].startswith("no: it recognises SDXL")


def test_stages_of_different_length_do_not_load_from_one_file_in_diffusers() -> None:
    plan = load_plan(["down_blocks.1.{resnets,attentions}.1", "up_blocks.2.{resnets,attentions}.1"])
    derived = derive(layout_config("sd-v1"), plan)
    assert derived.student_config["layers_per_block"] == [2, 1, 2, 2]
    assert derived.loads_in["diffusers, single file"].startswith("no")
    assert derived.loads_in["ComfyUI, single file"] == "yes"


def test_patterns_stay_within_a_part_and_expand_braces() -> None:
    assert expand("a.{b,c}.{0,1}") == ["a.b.0", "a.b.1", "a.c.0", "a.c.1"]
    names = ["down_blocks.0", "down_blocks.0.resnets.1", "down_blocks.0.attentions.1", "down_blocks.10"]
    assert match("down_blocks.*", names) == ["down_blocks.0", "down_blocks.10"]
    assert match("down_blocks.*.{resnets,attentions}.1", names) == names[1:3]


WRONG = {
    "no match": (["down_blocks.7"], "matches no module"),
    "not a block": (["time_embedding"], "cannot be removed"),
    "inside a block": (["down_blocks.0.resnets.0.conv1"], "cannot be removed"),
    "uneven": (["down_blocks.0.{resnets,attentions}.1"], "Uneven levels"),
    "one side": (["down_blocks.3"], "remove up_blocks.0 too"),
    "all": (["down_blocks.*", "up_blocks.*"], "keep at least"),
    "attention alone": (["down_blocks.0.attentions.1"], "no form"),
    "resnet alone": (["down_blocks.0.resnets.1", "up_blocks.3.{resnets,attentions}.1"], "without its resnet"),
    "all resnets": (["down_blocks.0.{resnets,attentions}.*", "up_blocks.3"], "remove the level"),
    "all transformer blocks": (["down_blocks.0.attentions.*.transformer_blocks.*"], "removes all"),
    "mid attention alone": (["mid_block.attentions.0"], "no form"),
    "mid resnet alone": (["mid_block.resnets.0"], "no form"),
    "skip width": (
        ["down_blocks.1.{resnets,attentions}.1", "up_blocks.2.{resnets,attentions}.0"],
        "another width",
    ),
    "outer stages": (["down_blocks.0", "up_blocks.3"], "another width"),
    "sampler that is needed": (["down_blocks.1.downsamplers"], "no form"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plan_is_refused_with_the_pattern_and_the_fix(case: str) -> None:
    patterns, words = WRONG[case]
    with pytest.raises(UserError, match=words) as error:
        derive(layout_config("sd-v1"), load_plan(patterns))
    assert "\n" not in str(error.value)


def test_uneven_depths_of_mid_and_last_stage_are_refused() -> None:
    with pytest.raises(UserError, match="one number for both"):
        derive(layout_config("sdxl"), load_plan(["mid_block.attentions.0.transformer_blocks.9"]))


def test_a_student_can_be_cut_again() -> None:
    """vega is a subset of ssd-1b's blocks, so both paths give the same student from the same teacher weights."""
    once = plan_of("sdxl", "ssd-1b")
    rest = load_plan(
        [
            "down_blocks.1.attentions.*.transformer_blocks.1",
            "down_blocks.2.attentions.*.transformer_blocks.[23]",
            "up_blocks.0.attentions.[01].transformer_blocks.[23]",
            "up_blocks.0.attentions.2.transformer_blocks.[2-9]",
            "up_blocks.1.attentions.0.transformer_blocks.1",
        ]
    )
    twice = derive(once.student_config, rest)
    direct = plan_of("sdxl", "vega")
    assert twice.student_size.parameters == direct.student_size.parameters
    assert {k: once.weight_map[v] for k, v in twice.weight_map.items()} == direct.weight_map


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bk-small'"):
        load_plan("bk-smal")


def test_unknown_key_of_a_plan_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'remove'"):
        load_plan({"remov": []})
