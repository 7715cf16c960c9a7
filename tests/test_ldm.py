"""The single-file layout: round trips, published facts, and the readers that users have."""

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from test_plan import PUBLISHED
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from prunet.errors import UserError
from prunet.teacher import placing
from prunet.teacher.ldm import (
    UNET,
    check_layout,
    from_ldm_unet,
    layout_of,
    place,
    to_ldm,
    unet_key_map,
    vae_key_map,
)

SD_V1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_V2 = SD_V1 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BASE = {"layers_per_block": 1}
SMALL = BASE | {"mid_block_type": None}
TINY = SMALL | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
SSD = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
VEGA = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (1, 1), (2, 2)),
    "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
}
MODELS = {
    "sd-v1": SD_V1,
    "sd-v1 bk-base": SD_V1 | BASE,
    "sd-v1 bk-small": SD_V1 | SMALL,
    "sd-v1 bk-tiny": SD_V1 | TINY,
    "sd-v2": SD_V2,
    "sd-v2 bk-base": SD_V2 | BASE,
    "sd-v2 bk-small": SD_V2 | SMALL,
    "sd-v2 bk-tiny": SD_V2 | TINY | {"attention_head_dim": (5, 10, 20)},
    "sdxl": SDXL,
    "sdxl ssd-1b": SDXL | SSD,
    "sdxl vega": SDXL | VEGA,
    "sdxl koala-1b": SDXL | BASE | {"transformer_layers_per_block": (1, 2, 6)},
    "sdxl koala-700m": SDXL | SMALL | {"transformer_layers_per_block": (1, 2, 5)},
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
# Stages with different numbers of layers; only prunet can read these files back.
CONFIGS = MODELS | {"sd-v1 uneven": SD_V1 | {"layers_per_block": (2, 1, 2, 1)}}


def from_ldm_vae(path: str | Path, config: Mapping[str, Any]) -> AutoencoderKL:
    """Reads the VAE of a single file, in the file's dtype; `config` is its diffusers config."""
    vae = placing.empty(AutoencoderKL, config)
    return placing.fill(vae, place(path, vae))


def from_ldm_text_encoder(path: str | Path, config: Any, index: int = 0) -> Any:
    """Reads text encoder `index` (1: the second of SDXL) of a single file; `config` is its transformers config."""
    cls = CLIPTextModelWithProjection if index else CLIPTextModel
    model = placing.empty(cls, config if isinstance(config, CLIPTextConfig) else CLIPTextConfig(**config))
    return placing.fill(model, place(path, model, index))


def fewer(depths):
    """Transformer depths, nested or not, with 10 cut to 3 and so on."""
    return {4: 2, 5: 3, 6: 3, 10: 3}.get(depths, depths) if isinstance(depths, int) else [*map(fewer, depths)]


def shrink(config):
    """Returns the same structure with small widths and depths."""
    widths = {320: 16, 640: 32, 1280: 32}
    small = dict(config, block_out_channels=[widths[width] for width in config["block_out_channels"]])
    for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        small |= {key: fewer(config[key])} if key in config else {}
    small |= {"sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4}
    if "addition_embed_type" in config:  # 32 + 48: the widths of the two text encoders; 16: their projection
        small |= {"cross_attention_dim": 80, "addition_time_embed_dim": 8}
        small |= {"projection_class_embeddings_input_dim": 6 * 8 + 16}
    return small


@cache
def unet_of(name):
    torch.manual_seed(0)
    return UNet2DConditionModel(**shrink(CONFIGS[name])).eval()


@cache
def vae_of(depth=4):
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 24)[:depth],
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        norm_num_groups=8,
        layers_per_block=2,
        sample_size=16,
    ).eval()


@cache
def text_encoder_of(cls=CLIPTextModel, width=32, layers=2):
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return cls(config).eval()


def text_encoders_of(name):
    if not name.startswith("sdxl"):
        return [text_encoder_of()]
    return [text_encoder_of(), text_encoder_of(CLIPTextModelWithProjection, width=48)]


@cache
def file_of(name):
    return to_ldm(unet_of(name), vae_of(), *text_encoders_of(name))


def meta(cls, **config):
    with torch.device("meta"):
        return cls(**config)


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_read_back_bit_equal(name, tmp_path):
    unet, vae = unet_of(name), vae_of()
    encoders = text_encoders_of(name)
    assert all(tensor.is_contiguous() for tensor in file_of(name).values())
    save_file(file_of(name), path := tmp_path / "student.safetensors")

    assert layout_of(path) == name.split()[0]
    assert_same(from_ldm_unet(path, unet.config), unet)
    assert_same(from_ldm_vae(path, vae.config), vae)
    for index, encoder in enumerate(encoders):
        again = from_ldm_text_encoder(path, encoder.config.to_dict(), index)
        assert_same(again, encoder)
        ids = torch.arange(16)[None] % 7
        assert torch.equal(again(ids).last_hidden_state, encoder(ids).last_hidden_state)


@pytest.mark.parametrize("name", MODELS)
def test_full_size_names_are_those_that_diffusers_reads(name):
    layout, _, plan = name.partition(" ")
    unet = meta(UNet2DConditionModel, **(config := MODELS[name]))
    assert sum(p.numel() for p in unet.parameters()) == PUBLISHED[layout, plan or "none"][0]
    state, key_map = unet.state_dict(), unet_key_map(config)
    assert key_map.keys() == state.keys()
    assert len(set(key_map.values())) == len(key_map)
    read = convert_ldm_unet_checkpoint({key_map[k]: v for k, v in state.items()}, dict(unet.config))
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in state.items()}


def test_published_names_and_numbers():
    v1 = unet_key_map(SD_V1)
    assert len(v1) == 686
    assert v1["down_blocks.3.resnets.1.conv1.weight"] == UNET + "input_blocks.11.0.in_layers.2.weight"
    assert v1["up_blocks.3.attentions.2.proj_in.bias"] == UNET + "output_blocks.11.1.proj_in.bias"
    assert v1["up_blocks.0.upsamplers.0.conv.weight"] == UNET + "output_blocks.2.1.conv.weight"
    assert v1["up_blocks.1.upsamplers.0.conv.weight"] == UNET + "output_blocks.5.2.conv.weight"
    assert v1["mid_block.resnets.1.conv2.weight"] == UNET + "middle_block.2.out_layers.3.weight"
    assert len(unet_key_map(SD_V2)) == 686
    vae = vae_key_map(VAE)
    assert len(vae) == 248
    assert vae["decoder.up_blocks.3.resnets.0.conv_shortcut.weight"] == (
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"
    )
    assert vae["encoder.mid_block.attentions.0.to_out.0.bias"] == "first_stage_model.encoder.mid.attn_1.proj_out.bias"


def test_sdxl_has_the_2515_tensors_of_the_published_file_less_two():
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    clip_g = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, projection_dim=1280)
    file = to_ldm(
        meta(UNet2DConditionModel, **SDXL),
        meta(AutoencoderKL, **VAE),
        meta(CLIPTextModel, config=clip_l),
        meta(CLIPTextModelWithProjection, config=clip_g),
    )
    assert len(file) == 2515 - 2  # position_ids, a constant, and logit_scale, which drawing does not need
    assert file["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (
        3840,
        1280,
    )
    assert file["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert file[UNET + "label_emb.0.0.weight"].shape == (1280, 2816)
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias" in file


def save_configs(pipeline, folder):
    """A pipeline folder for `from_single_file(config=...)`: everything except the weights."""
    pipeline.save_pretrained(folder)
    for weights in Path(folder).rglob("*.safetensors"):
        weights.unlink()
    return str(folder)


def tokenizer_of(folder):
    folder.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefg", *(f"{letter}</w>" for letter in "abcdefg")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def pipeline_of(name, folder):
    tokenizer, scheduler = tokenizer_of(folder), DDIMScheduler()
    unet, vae, encoders = unet_of(name), vae_of(), text_encoders_of(name)
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler)
    return StableDiffusionPipeline(
        vae, encoders[0], tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


@pytest.mark.parametrize(
    "name", ["sd-v1", "sd-v1 bk-tiny", "sd-v2", "sd-v2 bk-tiny", "sdxl", "sdxl ssd-1b", "sdxl koala-700m"]
)  # its reader of names is compared for all models above
def test_stock_diffusers_opens_the_file(name, tmp_path):
    pipeline = pipeline_of(name, tmp_path / "tokenizer")
    config = save_configs(pipeline, tmp_path / "config")
    parts = {k: getattr(pipeline, k, None) for k in ("unet", "vae", "text_encoder", "text_encoder_2")}
    save_file(file_of(name), path := tmp_path / "student.safetensors")

    again = type(pipeline).from_single_file(str(path), config=config, local_files_only=True)
    for part, model in parts.items():
        if model is not None:
            assert_same(getattr(again, part), model)


def test_stock_diffusers_opens_the_unet_alone(tmp_path):
    unet = unet_of("sd-v1 bk-small")
    save_file(to_ldm(unet, None, None), path := tmp_path / "unet.safetensors")
    unet.save_config(tmp_path)
    again = UNet2DConditionModel.from_single_file(str(path), config=str(tmp_path), local_files_only=True)
    assert_same(again, unet)


def test_stock_diffusers_cannot_open_stages_of_different_lengths():
    unet = unet_of("sd-v1 uneven")
    with pytest.raises(TypeError):
        convert_ldm_unet_checkpoint(file_of("sd-v1 uneven"), dict(unet.config))


@pytest.mark.parametrize("depth", [1, 3])
def test_vae_of_any_depth(depth, tmp_path):
    vae = vae_of(depth)
    save_file(to_ldm(unet_of("sd-v1 bk-small"), vae, None), path := tmp_path / "a.safetensors")
    assert_same(from_ldm_vae(path, vae.config), vae)
    vae.save_config(tmp_path)
    theirs = AutoencoderKL.from_single_file(str(path), config=str(tmp_path), local_files_only=True)
    assert_same(theirs, vae)


def test_dtype():
    unet = unet_of("sdxl ssd-1b")
    file = to_ldm(unet, None, None, dtype=torch.float16)
    assert {tensor.dtype for tensor in file.values()} == {torch.float16}
    assert unet.dtype == torch.float32


def test_classical_names_whatever_the_transformers_version():
    file = file_of("sd-v1 bk-base")
    clip = {key for key in file if key.startswith("cond_stage_model.")}
    assert len(clip) == 2 + 2 * 16 + 2
    assert all(key.startswith("cond_stage_model.transformer.text_model.") for key in clip)


def test_openclip_fuses_q_k_v_in_that_order():
    encoder = text_encoder_of()
    modules = encoder.named_modules()  # transformers before 5.6 has `text_model.` before this name
    layer = next(module for name, module in modules if name.endswith("encoder.layers.1.self_attn"))
    file = file_of("sd-v2 bk-base")
    fused = file["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(fused, torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
    projected = text_encoder_of(CLIPTextModelWithProjection, width=48)
    file = file_of("sdxl vega")
    assert torch.equal(file["conditioner.embedders.1.model.text_projection"], projected.text_projection.weight.T)


def test_layout_of_a_file_with_only_a_unet(tmp_path):
    path = tmp_path / "unet.safetensors"

    def layout(config, context_dim):
        unet = UNet2DConditionModel(**shrink(config) | {"cross_attention_dim": context_dim})
        save_file(to_ldm(unet, None, None), path)
        return layout_of(path)

    assert layout(SD_V1 | TINY, 768) == "sd-v1"
    assert layout(SD_V2 | BASE, 1024) == "sd-v2"
    assert layout(SDXL | VEGA, 2048) == "sdxl"
    assert layout(SDXL, 1280) is None  # the refiner
    assert layout(SD_V1 | BASE, 640) is None
    save_file({"model.diffusion_model.double_blocks.0.weight": torch.zeros(1)}, path)
    assert layout_of(path) is None


def test_layout_of_a_file_that_is_not_safetensors(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        layout_of(tmp_path / "missing.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(UserError, match="safetensors"):
        layout_of(tmp_path / "model.ckpt")


def test_reading_with_the_wrong_config_names_what_is_wrong(tmp_path):
    base, small = unet_of("sd-v1 bk-base"), unet_of("sd-v1 bk-small")
    save_file(to_ldm(base, vae_of(), text_encoder_of()), path := tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=r"has no model\.diffusion_model\.\S+, which this UNet2DConditionModel"):
        from_ldm_unet(path, unet_of("sd-v1").config)
    with pytest.raises(UserError, match=r"has model\.diffusion_model\.middle_block\.0\.\S+, for which"):
        from_ldm_unet(path, small.config)
    with pytest.raises(UserError, match=r"input_blocks\.0\.0\.weight is \[16, 4, 3, 3\], not \[16, 9, 3, 3\]"):
        from_ldm_unet(path, dict(base.config, in_channels=9))
    with pytest.raises(UserError, match=r"has no first_stage_model\.quant_conv|is \["):
        from_ldm_vae(path, dict(vae_of().config, latent_channels=8))
    with pytest.raises(UserError, match="has no text encoder 1"):
        from_ldm_text_encoder(path, text_encoder_of().config, 1)
    with pytest.raises(UserError, match=r"has no cond_stage_model\S+layers\.2\."):
        from_ldm_text_encoder(path, text_encoder_of(layers=3).config)


def test_models_without_a_single_file_form_are_refused():
    with pytest.raises(UserError, match=r"down_blocks\.0\.attentions\.0 \(Attention\)"):
        unet_key_map(shrink(SD_V1) | {"down_block_types": ("SimpleCrossAttnDownBlock2D",) + ("DownBlock2D",) * 3})
    with pytest.raises(UserError, match=r"time_embedding\.cond_proj\.weight"):
        unet_key_map(shrink(SD_V1) | {"time_cond_proj_dim": 8})
    unet = deepcopy(unet_of("sd-v1 bk-base"))
    unet.mid_block = None  # a change that the config does not show
    with pytest.raises(UserError, match=r"does not fit its config \(mid_block"):
        to_ldm(unet, None, None)
    with pytest.raises(UserError, match="two text encoders"):
        to_ldm(unet_of("sdxl vega"), None, text_encoder_of())
    with pytest.raises(UserError, match="two text encoders"):
        to_ldm(unet_of("sd-v1 bk-base"), None, text_encoder_of(), text_encoder_of())
    with pytest.raises(UserError, match="24 layers, SD v2's single file has 23"):
        to_ldm(unet_of("sd-v2 bk-base"), None, text_encoder_of(layers=24))
    vae = json.loads((Path(__file__).parent.parent / "emoji/emoji-sd/vae/config.json").read_text())
    check_layout(unet_of("sd-v2 bk-base").config, vae, {"num_hidden_layers": 23})
    check_layout(unet_of("sd-v1 bk-base").config, vae, {"num_hidden_layers": 24})
    with pytest.raises(UserError, match="24 layers, SD v2's single file has 23"):
        check_layout(unet_of("sd-v2 bk-base").config, vae, {"num_hidden_layers": 24})
    with pytest.raises(UserError, match="does not belong to a CLIP text encoder"):
        to_ldm(unet_of("sd-v1 bk-base"), None, torch.nn.Linear(2, 2))


def test_reading_leaves_the_file_alone(tmp_path):
    unet = unet_of("sd-v1 bk-tiny")
    save_file(before := to_ldm(unet, None, None), path := tmp_path / "a.safetensors")
    from_ldm_unet(path, unet.config).conv_in.weight.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file(path).items())
