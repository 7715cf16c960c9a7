"""The original LDM layout: a whole pipeline as one `.safetensors` file, for any pruned U-Net.

These are the "checkpoints" of SD v1, SD v2 and SDXL, as ComfyUI and diffusers' `from_single_file` read them. There is
no table for each model: the model is built on the meta device from its config, and a walk over its modules gives the
map of names, for writing and for reading.

Programs that open such a file, besides `place` below, which finds the tensors of everything that `to_ldm` writes:

- diffusers 0.42, `from_single_file(file, config=folder_of_configs)`, bit-equal: SD v1, SD v2, SDXL, bk-base, bk-small,
  bk-tiny, ssd-1b, vega, koala-1b, koala-700m. It does not open a plan that keeps different numbers of layers on the
  levels of the U-Net: `convert_ldm_unet_checkpoint` computes `config["layers_per_block"] + 1` (TypeError). It opens no
  student without `config=`. The two text encoders of SDXL must differ in width: diffusers tells them apart by it.
- ComfyUI (October 2025), for U-Nets of width 320: SD v1, v2, any plan with an attention in a down block; SDXL by the
  depths of its down blocks, `[0,0,2,2,10,10]`, `[0,0,2,2,4,4]`, `[0,0,1,1,2,2]`, `[0,2,5]`, `[0,2,6]`. It takes a
  student of SD v2.1 (v-prediction) for epsilon, unless its node ModelSamplingDiscrete is set: it reads `v_pred` for
  SDXL only, and otherwise looks at `output_blocks.11.1`, which a smaller student does not have.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from prunet.denoisers.unet2d.ldm_names import RESNET, ldm_modules
from prunet.errors import UserError
from prunet.teacher import placing

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {  # prefixes by layout and index of the text encoder; OpenCLIP's names follow `model.`, CLIP's the others
    ("sd-v1", 0): "cond_stage_model.transformer.",
    ("sd-v2", 0): "cond_stage_model.model.",
    ("sdxl", 0): "conditioner.embedders.0.transformer.",
    ("sdxl", 1): "conditioner.embedders.1.model.",
}
SD_V2_LAYERS = 23  # OpenCLIP ViT-H has 24, but every program takes the output of the 23rd for SD v2
INSTEAD = "export a diffusers folder instead"
THIRDS = ("q_proj", "k_proj", "v_proj")
#: Buffers of the noise schedule, which the scheduler recomputes, and marks (`prunet.teacher.marks`).
OF_THE_SCHEDULE = re.compile(
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor|v_pred|ztsnr"
    r"|edm_vpred\..*|denoiser\..*)$"
)
OTHER_CONFIG = "give the configs of its own pipeline with --config (in a recipe teacher.config)"


def to_ldm(
    unet: Any,
    vae: Any,
    text_encoder: Any,
    text_encoder_2: Any = None,
    dtype: torch.dtype | None = None,
    gaps: bool = False,
) -> dict[str, Tensor]:
    """Returns all tensors of a pipeline under their LDM names, contiguous, as `safetensors.torch.save_file` needs them.

    A part that is None is left out. With `dtype=None` each tensor keeps its dtype, and shares memory with the model
    where possible. `gaps`: the U-Net's layers are numbered like in stable-diffusion.cpp.
    `prunet.teacher.marks` adds the marks that say what the model predicts.

    Raises:
        UserError: a part has no form in this layout.
    """
    layout = _layout_for(unet.config, text_encoder, text_encoder_2)
    parts = [(unet, unet_key_map(unet.config, gaps))] + ([(vae, vae_key_map(vae.config))] if vae is not None else [])
    for index, encoder in enumerate((text_encoder, text_encoder_2)):
        if encoder is not None:
            parts.append((encoder, text_key_map(encoder.state_dict(), layout, index)))
    tensors = {key: tensor for model, key_map in parts for key, tensor in _pack(model, key_map).items()}
    return {key: tensor.detach().to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}


def check_layout(unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> None:
    """Refuses a pipeline that has no form in this layout, from its configs; of the text encoders from the first one's.

    Raises:
        UserError: a module has no LDM name, or the text encoder has more layers than the layout.
    """
    unet_key_map(unet)
    vae_key_map(vae)
    if unet.get("addition_embed_type") != "text_time" and unet.get("use_linear_projection"):
        _check_layers(int(text_encoder.get("num_hidden_layers", 0)))


def from_ldm_unet(path: str | Path, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Reads the U-Net of a single file, in the file's dtype; `config` is its diffusers config."""
    unet = placing.empty(UNet2DConditionModel, config)
    return placing.fill(unet, place(path, unet))


def place(path: str | Path, model: Any, index: int = 0) -> placing.Placed:
    """Finds each tensor of an empty model in a single file, from its header; `index`: that of a text encoder.

    Raises:
        UserError: the tensors of the file are not exactly those of the model.
    """
    if isinstance(model, UNet2DConditionModel | AutoencoderKL):
        key_map, stem = _key_map(model, _has_gaps(path)), UNET if isinstance(model, UNet2DConditionModel) else VAE
    else:
        layout = layout_of(path) or "unknown layout"
        if (layout, index) not in TEXT:
            raise UserError(f"{path} ({layout}) has no text encoder {index}: pass another file or another index")
        key_map, stem = text_key_map(model.state_dict(), layout, index), TEXT[layout, index].rpartition(".")[0]
        stem = stem.rpartition(".")[0] + "."  # without `transformer.` or `model.`, to notice tensors beside these
    found = placing.headers([Path(path)])
    return placing.place(model, found, key_map=key_map, unpack=_unpacked, stem=stem, fix=OTHER_CONFIG)


def layout_of(path: str | Path) -> str | None:
    """Returns `sd-v1`, `sd-v2`, `sdxl` or None (something else), from the file's header.

    The names of the text encoder's tensors decide; in a file without a text encoder, the U-Net's context width.
    """
    found = {placing.bare(key): header for key, header in placing.headers([Path(path)]).items()}
    cross = [key for key in found if key.startswith(UNET) and key.endswith(".attn2.to_k.weight")]
    width = found[cross[0]].shape[-1] if cross and found[cross[0]].shape else 0  # (C, width), the same in every block
    if UNET + "input_blocks.0.0.weight" not in found or any(".time_stack." in key for key in found):
        return None
    if UNET + "label_emb.0.0.weight" in found:  # SDXL (width 2048), its refiner (1280) and unCLIP (1024) have it
        return "sdxl" if width == 2048 or any(key.startswith(TEXT["sdxl", 1]) for key in found) else None
    for layout in ("sd-v1", "sd-v2"):
        if any(key.startswith(TEXT[layout, 0]) for key in found):
            return layout
    return {768: "sd-v1", 1024: "sd-v2"}.get(width)


def lacks(path: str | Path, layout: str) -> str | None:
    """Returns the prefix of the first part of this layout that a file lacks, or None."""
    found = {placing.bare(key) for key in placing.headers([Path(path)])}
    stems = [UNET, VAE, *(stem for (of, _), stem in TEXT.items() if of == layout)]
    return next((stem for stem in stems if not any(key.startswith(stem) for key in found)), None)


def unused(path: str | Path) -> dict[str, int]:
    """Counts the tensors that belong to no part of a pipeline, by the first word of their names."""
    stems = (UNET, VAE, *(stem.split(".")[0] + "." for stem in TEXT.values()))
    keys = (placing.bare(key) for key in placing.headers([Path(path)]))
    return Counter(key.split(".")[0] for key in keys if not key.startswith(stems) and not OF_THE_SCHEDULE.match(key))


def has_unet(path: str | Path, config: Mapping[str, Any]) -> bool:
    """Returns whether the file's U-Net has exactly the tensors of `config` (names, input channels), from its header."""
    found = {placing.bare(key): header for key, header in placing.headers([Path(path)]).items()}
    channels = found[UNET + "input_blocks.0.0.weight"].shape[1:2]
    keys = {key for key in found if key.startswith(UNET)}
    return keys == set(unet_key_map(config).values()) and channels == (config.get("in_channels", 4),)


# -- names: from diffusers' parameters to LDM's keys


def unet_key_map(config: Mapping[str, Any], gaps: bool = False) -> dict[str, str]:
    """Maps each U-Net parameter to its LDM name (`model.diffusion_model.` ...), one to one, for any plan."""
    return _key_map(placing.empty(UNet2DConditionModel, config), gaps)


def _has_gaps(path: str | Path) -> bool:
    """Returns whether a file numbers layers like stable-diffusion.cpp: a gap follows the first level's only layer."""
    found = {placing.bare(key) for key in placing.headers([Path(path)])}
    return not any(key.startswith(UNET + "input_blocks.2.") for key in found)


def vae_key_map(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps each VAE parameter to its LDM name (`first_stage_model.` ...), one to one, for any depth."""
    return _key_map(placing.empty(AutoencoderKL, config))


def text_key_map(names: Iterable[str], layout: str, index: int) -> dict[str, str]:
    """Maps each CLIP parameter to its LDM name; in OpenCLIP's layout q, k and v share one name."""
    key_map, prefix = {}, TEXT[layout, index]
    for name in names:
        key = name.removeprefix("text_model.")  # absent in CLIPTextModel since transformers 5
        if not key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.", "text_projection.")):
            raise UserError(f"{name} does not belong to a CLIP text encoder, the only kind that LDM has: {INSTEAD}")
        if prefix.endswith(".model."):
            for ours, theirs in _OPENCLIP.items():
                key = key.replace(ours, theirs)
        elif not key.startswith("text_projection."):
            key = f"text_model.{key}"
        key_map[name] = prefix + key
    return key_map


_OPENCLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_": "token_",
    "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final", "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.k_proj.": "attn.in_proj_", "self_attn.v_proj.": "attn.in_proj_",
    "self_attn.out_proj": "attn.out_proj", "text_projection.weight": "text_projection",
}  # fmt: skip
# Names inside the modules that the walks below visit, by type; modules of other types have no LDM form.
_UNET_INSIDE: dict[type, dict[str, str]] = {
    ResnetBlock2D: RESNET, Transformer2DModel: {}, nn.Conv2d: {}, nn.Linear: {}, nn.GroupNorm: {},
}  # fmt: skip
_VAE_INSIDE: dict[type, dict[str, str]] = {
    Attention: {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    ResnetBlock2D: {"conv_shortcut": "nin_shortcut"}, nn.Conv2d: {}, nn.GroupNorm: {},
}  # fmt: skip


def _vae_modules(vae: Any) -> Iterator[tuple[str, str]]:
    """Yields (module, LDM module). LDM numbers the decoder's blocks from the picture, diffusers from the latents."""
    for half, way in (("encoder", "down"), ("decoder", "up")):
        blocks = vae.get_submodule(f"{half}.{way}_blocks")
        for b, block in enumerate(blocks):
            ours = f"{half}.{way}_blocks.{b}"
            theirs = f"{half}.{way}.{b if way == 'down' else len(blocks) - 1 - b}"
            for i in range(len(block.resnets)):
                yield f"{ours}.resnets.{i}", f"{theirs}.block.{i}"
            if getattr(block, f"{way}samplers"):
                yield f"{ours}.{way}samplers.0.conv", f"{theirs}.{way}sample.conv"
        mid = vae.get_submodule(f"{half}.mid_block")
        for i in range(len(mid.resnets)):
            yield f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}"
        for i, attention in enumerate(mid.attentions):
            if attention is not None:
                yield f"{half}.mid_block.attentions.{i}", f"{half}.mid.attn_{i + 1}"
        for name in ("conv_in", "conv_norm_out", "conv_out"):
            yield f"{half}.{name}", f"{half}.{name.replace('conv_norm_out', 'norm_out')}"
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv") if getattr(vae, name) is not None)


def _key_map(model: Any, gaps: bool = False) -> dict[str, str]:
    """Maps parameters to LDM names, by the pairs of modules that the walks yield; every parameter must have one."""
    modules, prefix, inside = ldm_modules(model, gaps), UNET, _UNET_INSIDE
    if isinstance(model, AutoencoderKL):
        modules, prefix, inside = _vae_modules(model), VAE, _VAE_INSIDE
    key_map, known = {}, dict(model.named_modules())
    for name, target in modules:
        module: Any = known.get(name)
        if type(module) not in inside:
            raise UserError(f"LDM has no place for {name} ({type(module).__name__}): {INSTEAD}")
        for parameter in module.state_dict():
            layer, _, kind = parameter.rpartition(".")
            layer = inside[type(module)].get(layer, layer)
            key_map[f"{name}.{parameter}"] = prefix + ".".join(filter(None, (target, layer, kind)))
    if homeless := [name for name in model.state_dict() if name not in key_map]:
        raise UserError(f"LDM has no place for {homeless[0]}: {INSTEAD}")
    return key_map


# -- tensors: a model's state dict <-> the file's


def _pack(model: Any, key_map: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns a model's tensors with the names and shapes of LDM; q, k and v are joined if they share a key."""
    state, packed = model.state_dict(), {}
    if wrong := sorted(state.keys() ^ key_map.keys()):
        raise UserError(f"{type(model).__name__} does not fit its config ({wrong[0]}): build it from its config")
    for key, name in {key: name for name, key in key_map.items()}.items():  # each key once
        tensor = state[name]
        if ".in_proj_" in key:  # 3 x (C, C) -> (3C, C) and 3 x (C,) -> (3C,)
            tensor = torch.cat([state[name.replace(name.split(".")[-2], third)] for third in THIRDS])
        elif ".mid.attn_" in key and tensor.ndim == 2:  # (C, C) -> (C, C, 1, 1): 1x1 convolutions in LDM's VAE
            tensor = tensor[:, :, None, None]
        elif key.endswith(".text_projection"):  # (P, C) -> (C, P)
            tensor = tensor.T
        packed[key] = tensor
    return packed


def _unpacked(key: str, name: str, tensor: Tensor) -> Tensor:
    """Inverts `_pack` for one tensor; a tensor of an unexpected shape is returned unchanged."""
    if ".in_proj_" in key and tensor.ndim and tensor.shape[0] % 3 == 0:
        return tensor.chunk(3)[THIRDS.index(name.split(".")[-2])].clone()
    if ".mid.attn_" in key and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor.T.contiguous() if key.endswith(".text_projection") and tensor.ndim == 2 else tensor


def _layout_for(config: Mapping[str, Any], text_encoder: Any, text_encoder_2: Any) -> str:
    sdxl = config["addition_embed_type"] == "text_time"
    if sdxl != (text_encoder_2 is not None) and (text_encoder, text_encoder_2) != (None, None):
        raise UserError("to_ldm: an SDXL U-Net has two text encoders, all others have one: pass its own")
    if sdxl or not config["use_linear_projection"]:
        return "sdxl" if sdxl else "sd-v1"
    _check_layers(text_encoder.config.num_hidden_layers if text_encoder is not None else 0)
    return "sd-v2"


def _check_layers(layers: int) -> None:
    if layers > SD_V2_LAYERS:
        raise UserError(f"text_encoder has {layers} layers, SD v2's single file has {SD_V2_LAYERS}: {INSTEAD}")
