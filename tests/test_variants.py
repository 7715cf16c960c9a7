"""Weights in every form in which diffusers and transformers write them are those that stock diffusers loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

from prunet import Teacher, UserError, build, export, load_plan
from prunet.teacher.copying import check_other_parts, save_parts
from prunet.teacher.weight_files import WEIGHTS

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture
def teacher_folder(sd, tmp_path) -> Path:
    return Path(shutil.copytree(sd, tmp_path / "teacher"))


def rewrite(folder: Path, part: str, variant: str | None, shards: int, scale: float = 1.0, keep: bool = False) -> None:
    """Writes a part's weights in another form, multiplied by `scale`."""
    stem = WEIGHTS[part]
    whole = folder / part / f"{stem}.safetensors"
    tensors = {name: tensor * scale for name, tensor in load_file(whole).items()}
    if not keep:
        whole.unlink()
    named = f"{stem}.{variant}" if variant else stem
    if shards == 1:
        save_file(tensors, folder / part / f"{named}.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"{named}-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        chosen = {name: tensors[name] for name in names if files[name] == file}
        save_file(chosen, folder / part / file, metadata={"format": "pt"})
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    (folder / part / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def weights(teacher: Teacher, part: str) -> torch.Tensor:
    module = teacher.text_part(part) if part.startswith("text") else getattr(teacher, part)
    return next(module.parameters())


@pytest.mark.parametrize(("variant", "shards"), [(None, 2), ("fp16", 1), ("fp16", 3), ("non_ema", 1), ("bf16", 2)])
def test_parts_are_read_in_each_form_and_copied_as_stock_classes_load_them(
    sd, teacher_folder, tmp_path, variant, shards
) -> None:
    for part in PARTS:
        rewrite(teacher_folder, part, variant, shards)
    teacher, before = Teacher(teacher_folder), Teacher(sd)
    teacher.check_weights()
    (tmp_path / "copy").mkdir()
    save_parts(teacher, tmp_path / "copy")
    for part, cls in PARTS.items():
        assert torch.equal(weights(teacher, part), weights(before, part))
        folder = (
            teacher_folder if part == "unet" else tmp_path / "copy"
        )  # the U-Net is not copied: a student's goes there
        stock = cls.from_pretrained(folder, subfolder=part, variant=variant if part == "unet" else None)
        assert torch.equal(next(stock.parameters()), weights(before, part))


def test_a_safety_checker_of_which_only_the_variant_is_there_is_copied_as_stock_classes_load_it(
    teacher_folder, tmp_path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 8, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.save_pretrained(teacher_folder / "safety_checker", variant="fp16")
    assert not (teacher_folder / "safety_checker" / "model.safetensors").exists()
    CLIPImageProcessor().save_pretrained(teacher_folder / "feature_extractor")
    index = json.loads((teacher_folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (teacher_folder / "model_index.json").write_text(json.dumps(index))
    teacher = Teacher(teacher_folder)
    check_other_parts(teacher)
    (tmp_path / "copy").mkdir()
    save_parts(teacher, tmp_path / "copy")
    again = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "copy", subfolder="safety_checker")
    assert torch.equal(again.visual_projection.weight, checker.visual_projection.weight)


def test_the_fp16_variant_of_a_text_encoder_in_several_files_opens(teacher_folder, tmp_path) -> None:
    rewrite(teacher_folder, "text_encoder", None, 3)
    teacher = Teacher(teacher_folder)
    folder = export(teacher, build(teacher, load_plan("bk-tiny")), tmp_path / "student", fp16=True)
    pipe = DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
    for name, tensor in pipe.text_encoder.state_dict().items():
        assert torch.equal(tensor, teacher.text_part("text_encoder").state_dict()[name].half())
    files = sorted(path.name for path in (folder / "text_encoder").glob("*.safetensors"))
    assert [name for name in files if "fp16" in name] == ["model.fp16.safetensors"] and len(files) == 4


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("variant", [None, "non_ema"])
def test_of_several_forms_prunet_reads_and_knows_the_one_that_stock_classes_read(teacher_folder, part, variant) -> None:
    before = Teacher(teacher_folder).fingerprint([part])
    rewrite(teacher_folder, part, variant, 1 if variant else 2, scale=0.5, keep=True)
    stock = PARTS[part].from_pretrained(teacher_folder, subfolder=part)
    teacher = Teacher(teacher_folder)
    assert torch.equal(weights(teacher, part), next(stock.parameters()))
    reads_shards = variant is None and part == "unet"
    assert (teacher.fingerprint([part]) != before) == reads_shards


def test_variants_to_choose_from_are_refused_and_fp16_goes_first(teacher_folder) -> None:
    rewrite(teacher_folder, "unet", "bf16", 1, scale=0.5, keep=True)
    rewrite(teacher_folder, "unet", "non_ema", 2)
    with pytest.raises(UserError, match="variants bf16, non_ema, and none without") as error:
        Teacher(teacher_folder).check_weights()
    assert "\n" not in str(error.value)
    folder = teacher_folder / "unet"
    (folder / "diffusion_pytorch_model.bf16.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert [file.name for file in Teacher(teacher_folder).weight_files("unet")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]


@pytest.mark.parametrize(("part", "pickle"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_a_pickle_that_stock_classes_would_take_before_a_variant_is_refused(
    teacher_folder, capsys, part, pickle
) -> None:
    rewrite(teacher_folder, part, "non_ema", 1, scale=0.5)
    Teacher(teacher_folder).check_weights()
    assert "reading the weights of the variant non_ema" in " ".join(capsys.readouterr().err.split())
    whole = teacher_folder / part / f"{WEIGHTS[part]}.safetensors"
    found = whole.with_name(f"{pickle}.bin")
    torch.save(load_file(whole.with_name(f"{WEIGHTS[part]}.non_ema.safetensors")), found)
    with pytest.raises(UserError, match=rf"other weights: `prunet convert {found} -o {whole}`, or delete"):
        Teacher(teacher_folder).check_weights(headers_only=True)
    found.rename(found.with_name(f"{pickle}-00001-of-00002.bin"))
    with pytest.raises(UserError, match="save it as safetensors, or delete"):
        Teacher(teacher_folder).check_weights(headers_only=True)
