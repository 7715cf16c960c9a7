"""Text encoders as every client reads them: by the names of transformers 4."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from prunet import Teacher, build, export, load_plan
from prunet.exports.single_file import export_single_file
from prunet.teacher.text_names import copy

CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
WEIGHTS = "model.safetensors"


def names_of(layers: int, projection: bool = False) -> set[str]:
    """The names that transformers 4 has in a `CLIPTextModel` or `CLIPTextModelWithProjection` of so many layers."""
    linear = [f"self_attn.{part}_proj" for part in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    modules = [f"encoder.layers.{i}.{name}" for i in range(layers) for name in (*linear, "layer_norm1", "layer_norm2")]
    names = [f"{module}.{kind}" for module in (*modules, "final_layer_norm") for kind in ("weight", "bias")]
    names += ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    return {f"text_model.{name}" for name in names} | ({"text_projection.weight"} if projection else set())


def check(folder: Path, teacher: Teacher, layers: int = 2) -> None:
    """Returns the names in the files, and asserts that the installed transformers reads them without differences."""
    for part in teacher.text_encoders:
        files = sorted((folder / part).glob("*.safetensors"))
        tensors = {
            name: tensor for file in files if ".fp16" not in file.name for name, tensor in load_file(file).items()
        }
        assert tensors.keys() == names_of(layers, projection=part == "text_encoder_2")
        again, report = CLASSES[part].from_pretrained(folder / part, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = teacher.text_part(part).state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        for file in files:
            assert load_file(file).keys() <= tensors.keys()


def student_of(teacher: Teacher) -> torch.nn.Module:
    return build(teacher, load_plan("bk-base" if teacher.kind == "sd" else "vega"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_students_of_folders_and_of_single_files(kind, request, tmp_path) -> None:
    teacher = Teacher(request.getfixturevalue(kind))
    export(teacher, student_of(teacher), tmp_path / "out", fp16=True)
    check(tmp_path / "out", teacher)
    file = load_file(export_single_file(tmp_path / "out", tmp_path / "one.safetensors"))
    prefix = "cond_stage_model." if kind == "sd" else "conditioner.embedders.0."
    assert {key.removeprefix(f"{prefix}transformer.") for key in file if key.startswith(prefix)} == names_of(2)
    single = Teacher(tmp_path / "one.safetensors")
    export(single, single.unet, tmp_path / "again")
    check(tmp_path / "again", teacher)


def test_shards_and_their_index(sd, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "shards")
    (folder / "text_encoder" / WEIGHTS).unlink()
    Teacher(sd).text_part("text_encoder").save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    teacher = Teacher(folder)
    export(teacher, student_of(teacher), tmp_path / "out")
    check(tmp_path / "out", teacher)
    index = json.loads((tmp_path / "out" / "text_encoder" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert index.keys() == names_of(2)
    for file in set(index.values()):
        names = load_file(tmp_path / "out" / "text_encoder" / file).keys()
        assert names == {name for name, where in index.items() if where == file}


def test_good_names_stay_byte_for_byte(sd, tmp_path) -> None:
    """A teacher's own file is copied unchanged, with its metadata."""
    folder = shutil.copytree(sd, tmp_path / "classical")
    weights = folder / "text_encoder" / WEIGHTS
    tensors = load_file(weights)
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as transformers 4 wrote it until 4.30
    renamed = {name if name.startswith("text_model.") else f"text_model.{name}": v for name, v in tensors.items()}
    save_file({**renamed, **extra}, weights, metadata={"format": "pt", "made_by": "me"})
    teacher = Teacher(folder)
    export(teacher, student_of(teacher), tmp_path / "out")
    assert (tmp_path / "out" / "text_encoder" / WEIGHTS).read_bytes() == weights.read_bytes()


def test_what_is_renamed_has_the_same_bytes_each_time(sd, tmp_path) -> None:
    metadata = {"format": "pt", **{f"key {i}": "a" for i in range(20)}}
    save_file(load_file(sd / "text_encoder" / WEIGHTS), tmp_path / WEIGHTS, metadata=metadata)
    for name in ("a", "b"):
        copy(tmp_path / WEIGHTS, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata and set(file.keys()) == names_of(2)
