"""Pipelines as Core ML packages: what Apple's reader asks for, and that the programs compute what torch does."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mil import compute
from test_cli import call

from prunet import Teacher, UserError, generate
from prunet.exports.coreml import export_coreml
from prunet.recipe.values import Drawing

ROUNDING = 0.02  # of 16 bits, as a share of the root mean square
INPUTS = {
    "Unet": ["sample [2, 4, 8, 8]", "timestep [2]", "encoder_hidden_states [2, {width}, 1, 77]"],
    "TextEncoder": ["input_ids [1, 77]"],
    "VAEDecoder": ["z [1, 4, 8, 8]"],
}


def need_coremltools() -> None:
    pytest.importorskip("coremltools", reason="the extra `coreml` is not installed: pip install 'prunet[coreml]'")


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher]:
    need_coremltools()
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("coreml") / "folder"
    export_coreml(source, folder, ["a cat"], Drawing(steps=2, guidance_scale=3), card={"teacher": "sd"})
    return folder, Teacher(source)


@pytest.mark.processes
def test_names_and_shapes_are_those_of_apples_reader(exported) -> None:
    folder, teacher = exported
    width = teacher.unet_config["cross_attention_dim"]
    models = json.loads((folder / "coreml.json").read_text())["models"]
    asked = {name: [one.format(width=width) for one in inputs] for name, inputs in INPUTS.items()}
    text = ["last_hidden_state", "pooled_outputs"]
    if teacher.kind == "sdxl":
        asked["Unet"] += ["text_embeds [2, 24]", "time_ids [2, 6]"]
        asked["TextEncoder2"], text = asked["TextEncoder"], ["hidden_embeds", "pooled_outputs"]
    outputs = {"Unet": ["noise_pred"], "VAEDecoder": ["image"], "TextEncoder": text, "TextEncoder2": text}
    assert {name: model["inputs"] for name, model in models.items()} == asked
    assert all(model["outputs"] == outputs[name] for name, model in models.items())
    readme = (folder / "README.md").read_text()
    assert all(f"xcrun coremlcompiler compile {name}.mlpackage ." in readme for name in asked)
    assert json.loads((folder / "vocab.json").read_text()) == teacher.text_part("tokenizer").get_vocab()
    assert (folder / "merges.txt").read_text().startswith("#version")
    with pytest.raises(UserError, match="a pipeline for Core ML, which a Mac draws with: give the folder"):
        generate(folder, "a cat")


@pytest.mark.processes
@torch.no_grad()
def test_the_programs_compute_what_torch_does(exported) -> None:
    """Names the inputs as Apple's Swift code does, and reads outputs by the names that it reads."""
    folder, teacher = exported
    is_xl, width = teacher.kind == "sdxl", teacher.unet_config["cross_attention_dim"]
    torch.manual_seed(0)
    sample, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, width), torch.tensor([801.0, 801.0])
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    added = added if is_xl else {}
    ours = teacher.unet(sample, t, context, added_cond_kwargs=added, return_dict=False)[0]
    given = {"sample": sample, "timestep": t, "encoder_hidden_states": context.mT.unsqueeze(2), **added}
    assert apart(ours, compute(folder / "Unet.mlpackage", given)["noise_pred"]) < ROUNDING

    z = torch.randn(1, 4, 8, 8)
    ours = teacher.vae.decode(z, return_dict=False)[0]
    assert apart(ours, compute(folder / "VAEDecoder.mlpackage", {"z": z})["image"]) < (1e-4 if is_xl else ROUNDING)

    for name in teacher.text_encoders:
        ids = teacher.text_part(name.replace("text_encoder", "tokenizer"))("a cat", padding="max_length").input_ids
        out = teacher.text_part(name)(torch.tensor([ids]), output_hidden_states=True)
        found = compute(folder / f"TextEncoder{name[13:]}.mlpackage", {"input_ids": torch.tensor([ids]).float()})
        hidden = out.hidden_states[-2] if is_xl else out.last_hidden_state
        pooled = out.text_embeds if name.endswith("_2") else out.pooler_output
        assert apart(hidden, found["hidden_embeds" if is_xl else "last_hidden_state"]) < ROUNDING
        assert apart(pooled, found["pooled_outputs"]) < ROUNDING


@pytest.mark.processes
@pytest.mark.parametrize("bits", ["palettized", "int8-weights"])
def test_a_student_in_fewer_bits(bits, run_folder, capsys) -> None:
    need_coremltools()
    code, out, _ = call(capsys, "export", run_folder, "--coreml", f"--{bits}", "--json")
    folder, teacher = run_folder / f"coreml-{bits}", Teacher(run_folder / "pipeline")
    assert code == 0 and json.loads(out.splitlines()[-1])["output"] == str(folder)
    torch.manual_seed(0)
    sample, context, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16), torch.tensor([20.0, 20.0])
    with torch.no_grad():
        ours = teacher.unet(sample, t, context, return_dict=False)[0]
    given = {"sample": sample, "timestep": t, "encoder_hidden_states": context.mT.unsqueeze(2)}
    assert 1e-4 < apart(ours, compute(folder / "Unet.mlpackage", given)["noise_pred"]) < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction_type": "v_prediction"},
            "prediction_type of .* is v_prediction, and .* only epsilon: use .*--onnx",
        ),
        ({"beta_schedule": "linear"}, "beta_schedule of .* is linear, and .* only scaled_linear"),
    ],
)
def test_noise_that_apples_reader_does_not_know_is_refused(changes, message, sd, tmp_path) -> None:
    need_coremltools()
    folder = Path(shutil.copytree(sd, tmp_path / "sd"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        export_coreml(folder, tmp_path / "out", ["a cat"], Drawing())
    assert not (tmp_path / "out").exists()


def test_coremltools_that_is_not_installed(run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    code, _, err = call(capsys, "export", run_folder, "--coreml")
    assert code == 2 and "coremltools, which is not installed: pip install 'prunet[coreml]'" in err
    code, _, err = call(capsys, "export", run_folder, "--onnx", "--palettized")
    assert code == 2 and "--onnx --palettized: --palettized is for --coreml: leave one of them out" in err
