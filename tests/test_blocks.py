"""Transformers that are lists of blocks: published sizes; a student is its teacher without those blocks."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import jinja2
import pytest
import torch
from test_cli import call
from torch import nn

from prunet import Plan, Teacher, UserError, build, derive, load_plan
from prunet.denoisers.freeze import freeze
from prunet.denoisers.known import ARCHITECTURES, REFUSED, architecture_of
from prunet.teacher.known import layout_config
from prunet.words import many

HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
FLUX = {**HEADS, "in_channels": 4, "joint_attention_dim": 32, "num_single_layers": 4}
WAN = {**HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 32}
#: Small configs, and for each what a plan removes.
SMALL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "FluxTransformer2DModel": (
        {**FLUX, "num_layers": 4, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8], "guidance_embeds": True},
        ["transformer_blocks.[12]", "single_transformer_blocks.{0,3}"],
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "num_layers": 3, "timestep_guidance_channels": 32, "axes_dims_rope": [4, 4, 4, 4]},
        ["transformer_blocks.1", "single_transformer_blocks.{0,2}"],
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "attention_head_dim": 8}
        | {"num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "qk_norm": "rms_norm"}
        | {"pooled_projection_dim": 64, "pos_embed_max_size": 16, "dual_attention_layers": [0, 1, 3]},
        ["transformer_blocks.[12]"],
    ),
    "QwenImageTransformer2DModel": (
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 16}
        | {"axes_dims_rope": [8, 4, 4]},
        ["transformer_blocks.[12]"],
    ),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 32, "n_layers": 4, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [1024, 32, 32]},
        ["layers.[12]", "noise_refiner.0", "context_refiner.1"],
    ),
    "SanaTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 4, "num_attention_heads": 2}
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "sample_size": 8}
        | {"caption_channels": 8},
        ["transformer_blocks.{0,2}"],
    ),
    "PixArtTransformer2DModel": (
        {"sample_size": 8, "num_layers": 4, "attention_head_dim": 4, "num_attention_heads": 2, "caption_channels": 8}
        | {"cross_attention_dim": 8, "use_additional_conditions": False},
        ["transformer_blocks.{1,3}"],
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_attention_heads": 3}
        | {"num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": [4, 2, 2], "axes_lens": [300, 32, 32]}
        | {"cap_feat_dim": 8},
        ["layers.{0,2}", "noise_refiner.1", "context_refiner.0"],
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "num_mmdit_layers": 3, "num_single_dit_layers": 4, "attention_head_dim": 8}
        | {
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 256,
        },
        ["joint_transformer_blocks.1", "single_transformer_blocks.{0,2}"],
    ),
    "CogView4Transformer2DModel": (
        {"in_channels": 4, "num_layers": 4, "attention_head_dim": 4, "num_attention_heads": 4, "out_channels": 4}
        | {"text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8},
        ["transformer_blocks.[12]"],
    ),
    "WanTransformer3DModel": ({**WAN, "num_layers": 4, "rope_max_seq_len": 64}, ["blocks.[12]"]),
    "WanVACETransformer3DModel": (
        {**WAN, "num_layers": 5, "rope_max_seq_len": 64, "vace_layers": [0, 3], "vace_in_channels": 12},
        ["blocks.[12]"],
    ),
}
CLASSES = pytest.mark.parametrize("name", SMALL)


def config_of(name: str) -> dict[str, Any]:
    return {"_class_name": name, **SMALL[name][0]}


def make_folder(folder: Path, name: str) -> Path:
    """Writes a stock pipeline folder that has only a transformer, all of whose weights are random."""
    rng = torch.Generator().manual_seed(0)
    net = architecture_of({"_class_name": name}).make(config_of(name))
    for key, p in net.named_parameters():
        is_scale = p.ndim == 1 and "norm" in key and key.endswith("weight")
        p.data.copy_(is_scale + (0.3 if p.ndim == 1 else 0.08) * torch.randn(p.shape, generator=rng))
    net.save_pretrained(folder / "transformer")
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", name], "text_encoder": ["transformers", "T5"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("transformers")
    return {name: make_folder(where / name, name) for name in SMALL}


def filled(value: Any, rng: torch.Generator) -> Any:
    """Returns the example with random numbers in place of its zeros."""
    if isinstance(value, dict):
        return {key: filled(item, rng) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, rng) for item in value]
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch.randn(value.shape, generator=rng) if is_number else value


@torch.no_grad()
def output(net: nn.Module, name: str) -> torch.Tensor:
    inputs = architecture_of({"_class_name": name}).example_inputs(config_of(name), latent_size=(8, 8))
    out = net(**filled(inputs, torch.Generator().manual_seed(1)), return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def becomes_identity(block: nn.Module) -> None:
    """Makes a block return its inputs, in the order of its outputs."""

    def hook(module: nn.Module, args: Any, kwargs: Any, given: Any) -> Any:
        said = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        streams = [said[key] for key in ("hidden_states", "encoder_hidden_states", "x") if key in said]

        def same(out: torch.Tensor) -> torch.Tensor:
            return next(stream for stream in streams if stream is not None and stream.shape == out.shape)

        return tuple(map(same, given)) if isinstance(given, tuple) else same(given)

    block.register_forward_hook(hook, with_kwargs=True)


@CLASSES
def test_student_computes_what_the_teacher_does_without_those_blocks(name, folders, tmp_path) -> None:
    teacher = Teacher(folders[name], only_form=True)
    teacher.check_weights()
    stock = getattr(diffusers, name)
    whole = output(freeze(stock.from_pretrained(folders[name] / "transformer")), name)
    assert torch.equal(output(build(teacher, Plan("none")), name), whole)

    plan = load_plan(SMALL[name][1])
    student = build(teacher, plan)
    ours = output(student, name)
    student.save_pretrained(tmp_path)
    again, info = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(freeze(again), name), ours)

    for part in derive(teacher.unet_config, plan).removed:
        becomes_identity(teacher.unet.get_submodule(part))
    assert torch.equal(output(teacher.unet, name), ours)
    assert ours.isfinite().all() and not torch.allclose(ours, whole, rtol=0.01)


@CLASSES
def test_fields_of_the_table_are_the_lengths_of_the_lists(name) -> None:
    """An integer field of the config is in the table if and only if lists of blocks shrink with it."""
    architecture = architecture_of({"_class_name": name})

    def lengths(config: dict[str, Any]) -> dict[str, int]:
        net = architecture.skeleton(config)
        lists = {key: len(module) for key, module in net.named_modules() if isinstance(module, nn.ModuleList)}
        return {key: n for key, n in lists.items() if not any(key.startswith(f"{outer}.") for outer in lists)}

    full = json.loads(json.dumps(dict(architecture.skeleton(config_of(name)).config)))
    before, found = lengths(full), {}
    for field in [key for key, value in full.items() if type(value) is int and 1 < value < 10]:
        try:
            after = lengths({**full, field: full[field] - 1})
        except UserError:
            continue
        if lists := tuple(key for key in before if after.get(key) == before[key] - 1):
            found[field] = lists
    assert {field: set(lists) for field, lists in found.items()} == {
        field: set(lists) for field, lists in architecture.lists(full).items()
    }


@CLASSES
def test_drawing_and_pairs_name_the_kept_blocks(name) -> None:
    derived = derive(config_of(name), load_plan(SMALL[name][1]))
    parts = [part for section in derived.diagram().sections for layer in section.layers for part in layer]
    stay = {part.name for part in parts if not part.gone}
    assert {pair.teacher for pair in derived.pairs()} == stay
    assert {pair.student for pair in derived.pairs()} == {
        part.name
        for s in derive(derived.student_config, Plan("none")).diagram().sections
        for x in s.layers
        for part in x
    }
    assert derived.student_size.macs < derived.teacher_size.macs
    assert architecture_of(derived.student_config).blocks


@pytest.mark.parametrize(
    ("layout", "plan", "parameters"),
    [
        ("flux-dev", None, 11_901_408_320),
        ("flux-dev", "flux-lite", 8_163_264_064),
        ("flux-dev", "flux-mini", 3_179_199_552),
        ("qwen-image", None, 20_430_401_088),
        ("qwen-image", "amber-10b", 10_235_462_208),
        ("qwen-image", [f"transformer_blocks.{i}" for i in range(1, 26)], 11_935_000_000),
        ("sd3.5-medium", None, 2_243_171_520),
        ("sd3.5-large", None, 8_056_627_520),
        ("z-image", None, 6_154_908_736),
        ("sana-1.6b", None, 1_604_462_752),
        ("pixart-sigma", None, 610_856_096),
    ],
)
def test_published_sizes(layout, plan, parameters) -> None:
    derived = derive(layout_config(layout), load_plan(plan) if plan else Plan("none"))
    net = derived.architecture.skeleton(derived.student_config)
    assert round(sum(p.numel() for p in net.parameters()), -6) == round(parameters, -6)


def test_fields_with_block_numbers_follow_the_blocks() -> None:
    sd3 = derive(config_of("SD3Transformer2DModel"), load_plan(["transformer_blocks.[12]"]))
    assert sd3.student_config["dual_attention_layers"] == [0, 1]
    vace = derive(config_of("WanVACETransformer3DModel"), load_plan(["blocks.[12]"]))
    assert vace.student_config["vace_layers"] == [0, 1]


def test_empty_plan_keeps_the_config() -> None:
    config = layout_config("sd3.5-medium")
    assert derive(config, Plan("none")).student_config == config


def test_old_configs_of_pixart_are_read() -> None:
    old = {**config_of("PixArtTransformer2DModel"), "_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}
    assert derive(old, load_plan(["transformer_blocks.1"])).student_config["_class_name"] == "PixArtTransformer2DModel"


def test_where_a_shallower_sd3_loads() -> None:
    whole = derive(layout_config("sd3.5-medium"), Plan("none"))
    assert whole.loads_in["ComfyUI"] == whole.works_with["skip-layer guidance"] == "yes"
    less = derive(layout_config("sd3.5-medium"), load_plan(["transformer_blocks.1"]))
    assert less.loads_in["ComfyUI"].startswith("no: it expects 24 blocks at this width, and the student has 23")
    assert all(answer.startswith("no: ") for answer in less.works_with.values())


@pytest.mark.parametrize(
    ("name", "patterns", "message"),
    [
        ("FluxTransformer2DModel", ["transformer_blocks.*"], "leaves no block of transformer_blocks"),
        ("FluxTransformer2DModel", ["transformer_blocks"], "removed: choose from blocks of transformer_blocks"),
        ("FluxTransformer2DModel", ["transformer_blocks.0.attn"], "cannot be removed"),
        ("FluxTransformer2DModel", ["down_blocks.0"], r"with the blocks transformer_blocks.0 to .3, single"),
        ("SD3Transformer2DModel", ["transformer_blocks.4"], "except the last one"),
        ("WanVACETransformer3DModel", ["blocks.3"], "except those in vace_layers"),
        ("ZImageTransformer2DModel", ["noise_refiner.0"], "1 of noise_refiner and 2 of context_refiner; diffusers has"),
    ],
)
def test_plan_without_a_form_is_refused(name, patterns, message) -> None:
    with pytest.raises(UserError, match=message):
        derive(config_of(name), load_plan(patterns))


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_cannot_lose_blocks_are_refused(name) -> None:
    assert hasattr(diffusers, name)
    with pytest.raises(UserError, match=f"The denoiser is a {name}: no block of it can be removed, because "):
        derive({"_class_name": name}, Plan("none"))


def test_every_class_of_the_table_is_tested() -> None:
    assert {a.class_name for a in ARCHITECTURES if a.only_form} == set(SMALL)


def test_build_writes_a_stock_folder(folders, tmp_path, capsys) -> None:
    name = "FluxTransformer2DModel"
    page = tmp_path / "plan.json"
    page.write_text(json.dumps(SMALL[name][1]))
    code, out, _ = call(capsys, "build", folders[name], "--plan", page, "-o", tmp_path / "student")
    assert code == 0 and f"a {name} of" in out.replace("\n", " ")
    net = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "student")
    assert (len(net.transformer_blocks), len(net.single_transformer_blocks)) == (2, 2)


def test_inspect_draws_the_kept_blocks(folders, tmp_path, capsys) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(SMALL["FluxTransformer2DModel"][1]))
    _, out, _ = call(capsys, "inspect", folders["FluxTransformer2DModel"], "--plan", tmp_path / "plan.json")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "transformer_blocks 2 of 4 0 · · 3" in lines and "single_transformer_blocks 2 of 4 · 1 2 ·" in lines


def test_page_draws_the_kept_blocks() -> None:
    env = jinja2.Environment(loader=jinja2.PackageLoader("prunet.report", "."), undefined=jinja2.StrictUndefined)
    env.filters["many"] = many
    page = env.from_string("{% import 'macros.html.j2' as m %}{{ m.reading(net) }}{{ m.denoiser(net) }}")
    for name, (_, patterns) in SMALL.items():
        derived = derive(config_of(name), load_plan(patterns))
        text = page.render(net=derived.diagram())
        assert text.count('class="part block gone"') == len(derived.removed)
        assert text.count('class="part block"') == len(derived.form.module_map) + 1  # that of the legend


@pytest.mark.parametrize("verb", ["generate", "estimate", "bench", "measure"])
def test_what_cannot_be_done_yet_is_refused_in_one_line(verb, folders, tmp_path, capsys) -> None:
    teacher = folders["FluxTransformer2DModel"]
    recipe = {"teacher": str(teacher), "plan": ["transformer_blocks.1"], "data": {"prompts": ["a"]}}
    recipe |= {"stages": [{"steps": 1}], "evaluation": {"prompts": ["a"]}, "output": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    rest = {
        "generate": (teacher, "a cat", "-o", tmp_path / "a.png"),
        "estimate": (tmp_path / "recipe.yaml", "--device", "cpu"),
        "bench": (teacher, "--device", "cpu"),
        "measure": (teacher, "--protocol", "emoji/protocols/emoji-train.yaml", "-o", tmp_path / "m", "--device", "cpu"),
    }[verb]
    code, _, err = call(capsys, verb, *rest)
    assert code == 2
    assert "its denoiser is a FluxTransformer2DModel; prunet can plan and build students" in err


@pytest.mark.parametrize(
    ("field", "new"),
    [
        *(("num_layers", new) for new in (10**9, "x", 0, 201, None)),
        *(("_class_name", new) for new in ("UNet2DConditionModel", "HunyuanDiT2DModel", None)),
        *(("axes_dims_rope", [10**9, 1, 1]), ("in_channels", -1), ("attention_head_dim", 1e308), ("sample_size", 1e9)),
    ],
)
def test_damaged_config_is_refused(field, new, folders, tmp_path) -> None:
    config = json.loads((folders["FluxTransformer2DModel"] / "transformer" / "config.json").read_text())
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, field: new}))
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        derive(Teacher(tmp_path, only_form=True).unet_config, Plan("none"))


def test_weights_of_another_depth_are_refused(folders, tmp_path) -> None:
    name = "QwenImageTransformer2DModel"
    config = json.loads((folders[name] / "transformer" / "config.json").read_text())
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 5}))
    (tmp_path / "model_index.json").write_text((folders[name] / "model_index.json").read_text())
    weights = "transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(folders[name] / weights)
    with pytest.raises(UserError, match=r"has no transformer_blocks\.4"):
        Teacher(tmp_path, only_form=True).check_weights(headers_only=True)
