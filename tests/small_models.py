"""Makes small Stable Diffusion pipelines of the real layouts, and pictures; nothing is downloaded."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from prunet.denoisers.unet2d.form import make_unet

SMALL_UNETS = {
    "sd": {
        "sample_size": 8,
        "block_out_channels": [16, 16, 32, 32],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": [16, 16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "cross_attention_dim": 40,
        "attention_head_dim": [2, 2, 4],
        "transformer_layers_per_block": [1, 2, 4],  # enough for SSD-1B and Vega
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}
SMALL_UNETS["sdxl_deep"] = SMALL_UNETS["sdxl"] | {"transformer_layers_per_block": [1, 2, 10]}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _text_encoder(vocab: int, width: int, projection: int | None = None) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_pipeline(folder: Path, kind: str, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A random pipeline folder of SD v1's layout (`sd`) or SDXL's (`sdxl`; `sdxl_deep` with all ten blocks): 16 px
    pictures, 8x8 latents.
    """
    torch.manual_seed(seed)
    unet = make_unet(SMALL_UNETS[kind])
    for p in unet.parameters():  # diffusers makes biases 0 and scales 1, which would hide a wrong copy
        p.data.add_(0.02 * torch.randn_like(p))
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        force_upcast=kind != "sd",
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    tokenizer = make_tokenizer(folder.parent / f".{folder.name}-tokenizer")
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
    if kind != "sd":
        pipe = StableDiffusionXLPipeline(
            **parts,
            text_encoder=_text_encoder(len(tokenizer), 16),
            text_encoder_2=_text_encoder(len(tokenizer), 24, 24),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            text_encoder=_text_encoder(len(tokenizer), 16),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def make_pictures(folder: Path, count: int = 12, size: int = 20) -> Path:
    """A folder of pictures with a `.txt` beside each."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(7)
    for i in range(count):
        pixels = torch.randint(0, 256, (size, size + i % 3, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}\n")
    return folder
