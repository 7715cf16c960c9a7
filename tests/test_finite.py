"""NaN and infinity are reported with their source; the learning rate is not blamed, and no picture is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunet import Drawing, Teacher, UserError, build, cache, derive, distil, generate, load_plan
from prunet.evaluation.networks import Clip
from prunet.recipe.recipe import Data, Stage
from prunet.runtime import Runtime

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAN = float("nan")


def scaled(teacher: Path, to: Path, part: str, key: str, factor: float) -> Path:
    """Copies a teacher and multiplies one tensor by a factor."""
    folder = Path(shutil.copytree(teacher, to))
    tensors = load_file(folder / part / WEIGHTS)
    save_file({**tensors, key: tensors[key] * factor}, folder / part / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("part", "key", "factor", "message"),
    [
        ("unet", "conv_out.bias", NAN, r"unet/\S+: conv_out\.bias has NaN or infinity"),
        ("vae", "encoder.conv_in.weight", float("inf"), r"vae/\S+: encoder\.conv_in\.weight has NaN or infinity"),
        ("unet", "conv_out.weight", 1e38, r"'a cat' \(seed 3\): the latents are not finite in torch\.float32"),
        ("vae", "decoder.conv_out.weight", 3e38, r"The decoded picture is not finite in torch\.float32"),
    ],
)
def test_generate_writes_no_picture_that_is_not_finite(part, key, factor, message, sd, tmp_path) -> None:
    folder = scaled(sd, tmp_path / "t", part, key, factor)
    with pytest.raises(UserError, match=message):
        generate(folder, "a cat", drawing=Drawing(steps=2), seed=3, save_to=[tmp_path / "a.png"])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("where", ["conv_out", "mid_block.resnets.0.conv1"])
def test_the_teachers_own_output_is_not_blamed_on_the_learning_rate(where, sd, pictures, tmp_path) -> None:
    teacher = Teacher(sd)
    made = cache(teacher, Data(source=str(pictures)), tmp_path / "cache")
    plan = load_plan("bk-small")
    student, pairs = build(teacher, plan), derive(teacher.unet_config, plan).pairs()
    teacher.unet.get_submodule(where).bias.data.fill_(NAN)
    with pytest.raises(UserError, match=r"At step 1 the output of the teacher .* is not finite: it overflows") as error:
        distil(
            teacher,
            student,
            pairs,
            made,
            Stage(steps=2, batch_size=2),
            tmp_path / "stage",
            runtime=Runtime(device="cpu", precision="no", log_every=1),
        )
    assert "learning_rate" not in str(error.value)


@pytest.mark.parametrize("buckets", [False, True])
def test_a_latent_that_is_not_finite_names_its_picture(buckets, sd, pictures, tmp_path, monkeypatch) -> None:
    teacher, real, seen = Teacher(sd), Teacher.encode_images, []

    def fourth_breaks(self, pixels):
        mean, std = real(self, pixels)
        for row in range(len(mean)):
            seen.append(row)
            if len(seen) == 4:
                std[row, 0, 0, 0] = NAN
        return mean, std

    monkeypatch.setattr(Teacher, "encode_images", fourth_breaks)
    with pytest.raises(UserError, match=r"'.*003\.png': its latents are not finite \(std") as error:
        cache(teacher, Data(source=str(pictures), buckets=buckets), tmp_path / "cache")
    assert "overflows in torch.float32" in str(error.value)
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_an_embedding_that_is_not_finite_names_its_prompt(sd, tmp_path, monkeypatch) -> None:
    real = Teacher.encode_prompts

    def dogs_break(self, prompts, **options):
        found = real(self, prompts, **options)
        for row, prompt in enumerate(prompts):
            if prompt == "a dog":
                found["prompt_embeds"][row, 0, 0] = 1e6  # more than half precision holds
        return found

    monkeypatch.setattr(Teacher, "encode_prompts", dogs_break)
    data = Data(prompts=["a cat", "a dog", "a cow"], steps=1)
    with pytest.raises(UserError, match="'a dog': its prompt embeddings are not finite"):
        cache(Teacher(sd), data, tmp_path / "cache")


def test_a_scorer_with_random_weights_or_without_words_is_refused(tmp_path) -> None:
    source = Path(__file__).parent.parent / "emoji" / "emoji-clip"
    assert Clip.load(source).hash
    folder = Path(shutil.copytree(source, tmp_path / "clip"))
    tensors = load_file(folder / "model.safetensors")
    for key in ("text_projection.weight", "vision_model.post_layernorm.bias"):
        save_file({k: v for k, v in tensors.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"has no {key}, which a CLIPModel needs"):
            Clip.load(folder)
        save_file({**tensors, key: tensors[key] * NAN}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"{key} has NaN"):
            Clip.load(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = json.loads((folder / "tokenizer.json").read_text())
    special = {token: number for token, number in words["model"]["vocab"].items() if token.startswith("<|")}
    words["model"] |= {"vocab": special, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="its tokenizer gives the same tokens for all words"):
        Clip.load(folder)


def test_finite_numbers_of_every_kind_are_finite() -> None:
    from prunet.teacher.placing import is_finite

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = torch.ones(3, 3).to(dtype)
        assert is_finite(tensor)
        tensor[1, 2] = NAN
        assert not is_finite(tensor)
    assert is_finite(torch.empty(0)) and is_finite(torch.arange(3)) and not is_finite(torch.tensor(float("-inf")))
