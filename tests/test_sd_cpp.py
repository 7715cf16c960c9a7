"""Files for stable-diffusion.cpp: its numbering of layers, GGUF, and what is refused."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_cli import call

from prunet import Teacher, build, export, load_plan
from prunet.exports import single_file
from prunet.exports.gguf import write_gguf
from prunet.exports.single_file import check_for_cpp, export_single_file
from prunet.plan.derived import derive
from prunet.plan.plan import Plan
from prunet.teacher.known import layout_config
from prunet.teacher.ldm import unet_key_map


def config_of(layout: str, plan: str | None) -> dict:
    return derive(layout_config(layout), load_plan(plan) if plan else Plan("none")).student_config


def test_the_layers_of_bk_tiny_keep_the_numbers_of_sd_v1() -> None:
    """As diffusers' conversion script and stable-diffusion.cpp count: three a level."""
    names = unet_key_map(config_of("sd-v1", "bk-tiny"), gaps=True)
    whole = unet_key_map(config_of("sd-v1", None))
    for level in range(3):
        for ours in (
            f"down_blocks.{level}.resnets.0.conv1.weight",
            f"down_blocks.{level}.attentions.0.proj_in.weight",
            *([f"down_blocks.{level}.downsamplers.0.conv.weight"] if level < 2 else []),
            *(f"up_blocks.{level}.resnets.{i}.conv1.weight" for i in range(2)),
            *([f"up_blocks.{level}.upsamplers.0.conv.weight"] if level < 2 else []),
        ):
            assert names[ours] == whole[ours], ours


@pytest.mark.parametrize(("layout", "plan"), [("sd-v2", None), ("sdxl", None), ("sdxl", "ssd-1b"), ("sdxl", "vega")])
def test_other_models_that_it_knows_have_no_gaps(layout, plan) -> None:
    config = config_of(layout, plan)
    assert unet_key_map(config, gaps=True) == unet_key_map(config)
    check_for_cpp(config)


@pytest.mark.parametrize(
    ("layout", "plan", "why"),
    [
        ("sd-v1", "bk-small", "it knows only the whole SD v1"),
        ("sdxl", "koala-700m", "it knows only the whole SD v1"),
        ("sd-v2", ["mid_block"], "it knows only the whole SD v1"),
        ("sdxl", ["mid_block"], "it knows only the whole SD v1"),
    ],
)
def test_models_that_it_does_not_know_are_refused(layout, plan, why) -> None:
    with pytest.raises(single_file.UserError, match=rf"does not load this student: {why}.*; export without --for"):
        check_for_cpp(config_of(layout, plan))


@pytest.fixture(scope="module")
def tiny(sd, tmp_path_factory) -> Path:
    """A student of bk-tiny's form; narrower than stable-diffusion.cpp can open."""
    teacher = Teacher(sd)
    return export(teacher, build(teacher, load_plan("bk-tiny")), tmp_path_factory.mktemp("tiny") / "pipeline")


def test_a_file_with_gaps_is_read_back(tiny, tmp_path, monkeypatch) -> None:
    with pytest.raises(single_file.UserError, match="not the widths of SD v1"):
        export_single_file(tiny, tmp_path / "a.safetensors", program="sd.cpp")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(single_file, "check_for_cpp", lambda config: None)
    again = Teacher(export_single_file(tiny, tmp_path / "a.safetensors", program="sd.cpp"))
    for name, tensor in Teacher(tiny).unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor), name


@pytest.mark.parametrize(("bits", "error"), [("q8_0", 0.01), ("q4_0", 0.1)])
def test_gguf(bits, error, tiny, tmp_path, monkeypatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(single_file, "check_for_cpp", lambda config: None)
    path = export_single_file(tiny, tmp_path / "a.gguf", bits=bits)
    assert single_file.is_exported(path)
    own = {"model.diffusion_model.out.1.weight": torch.randn(40, 64), "v_pred": torch.empty(0)}
    write_gguf(own, path, bits)
    first, mark = gguf.GGUFReader(path).tensors
    assert (first.tensor_type.name, mark.name) == (bits.upper(), "v_pred")
    got = torch.tensor(gguf.quants.dequantize(first.data, first.tensor_type))
    expected = own["model.diffusion_model.out.1.weight"]
    assert (got - expected).norm() / expected.norm() < error


def test_kinds_of_tensors_in_gguf(tiny, tmp_path, monkeypatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(single_file, "check_for_cpp", lambda config: None)
    file = export_single_file(tiny, tmp_path / "a.gguf", bits="q8_0")
    kinds = {tensor.name: (tensor.tensor_type.name, len(tensor.shape)) for tensor in gguf.GGUFReader(file).tensors}
    assert kinds.keys() >= {*unet_key_map(Teacher(tiny).unet_config, gaps=True).values()}
    for name, (kind, rank) in kinds.items():
        assert kind == "F32" if rank == 1 else kind == "F16" if rank == 4 else kind in ("F16", "Q8_0"), name
        assert kind != "Q8_0" or not re.search(r"time_embed|embedding", name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--single-file", "--for", "sd.cpp"], "stable-diffusion.cpp does not load this student: not the widths"),
        (["--for", "sd.cpp"], "--for: needs --single-file"),
        (["--gguf", "q8_0", "--for", "comfyui"], "--gguf --for: --for is for --single-file"),
        (["--gguf", "q8_0", "--fp16"], "--gguf --fp16: --fp16 is for a stock folder or --single-file"),
        (["--gguf", "q8_0", "--openvino"], "--gguf --openvino: one export at a time"),
        (["--gguf", "q8_0", "-o", "a.safetensors"], "give NAME.gguf"),
        (["--gguf", "q2_k"], "q2_k"),
    ],
)
def test_export_refuses(options, message, run_folder, capsys) -> None:
    before = sorted(run_folder.rglob("*"))
    code, _, err = call(capsys, "export", run_folder, *options)
    assert code == 2 and message in err and sorted(run_folder.rglob("*")) == before


def test_two_files_do_not_share_their_configs(run_folder, tmp_path, capsys) -> None:
    (tmp_path / "tiny.safetensors").write_bytes(b"an export")
    code, _, err = call(capsys, "export", run_folder, "--gguf", "q8_0", "-o", tmp_path / "tiny.gguf")
    assert code == 2 and "would replace those of tiny.safetensors beside it: give another name" in err


def test_gguf_that_is_not_installed(run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = call(capsys, "export", run_folder, "--gguf", "q8_0")
    assert code == 2 and "pip install 'prunet[gguf]'" in err
