"""Pipelines as ONNX: models compute what torch does at any size, and a sampler in NumPy draws what diffusers does."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import levels_apart
from diffusers import AutoencoderTiny
from PIL import Image
from test_cli import call

from prunet import Teacher, UserError, generate
from prunet.exports.onnx import export_onnx
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw
from prunet.sampling.samplers import set_sampler
from prunet.speed.models import open_models

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parent.parent / "examples" / "edge" / "draw_onnx.py"
NEAR = 2  # of 255


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher]:
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("onnx") / "folder"
    facts = export_onnx(source, folder, ["a cat"], Drawing(steps=2, guidance_scale=3), card={"teacher": "sd"})
    assert facts["made_for"]["sampler"] == "ddim"  # in place of dpmsolver++
    assert {*facts["models"]} == {"unet", "vae_decoder", *Teacher(source).text_encoders}
    return folder, Teacher(source)


def ours(folder: Path, prompt: str, seed: int) -> Image.Image:
    spec = importlib.util.spec_from_file_location("draw_onnx", EXAMPLE)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture: Image.Image = example.draw(folder, prompt, seed)
    return picture


def made_for(folder: Path, copy: Path, how: Drawing) -> Path:
    from prunet.sampling.made_for import write_made_for

    write_made_for(Path(shutil.copytree(folder, copy)), how)
    return copy


@pytest.mark.parametrize(
    "how",
    [
        Drawing(steps=3, guidance_scale=3, sampler="ddim"),
        Drawing(steps=3, guidance_scale=1, sampler="ddim-trailing"),
        Drawing(steps=1, guidance_scale=1, sampler="lcm"),
    ],
    ids=str,
)
def test_the_example_draws_what_diffusers_draws(exported, how, tmp_path) -> None:
    folder, teacher = exported
    noise = np.random.default_rng(5).standard_normal((1, 4, 8, 8), np.float32)
    theirs = set_sampler(teacher.pipeline(), how.sampler)(
        "a red cat",
        num_inference_steps=how.steps,
        guidance_scale=how.guidance_scale,
        latents=torch.from_numpy(noise),
        height=16,
        width=16,
    ).images[0]
    assert levels_apart(ours(made_for(folder, tmp_path / "copy", how), "a red cat", 5), theirs) <= NEAR


@pytest.mark.parametrize("exported", ["sd"], indirect=True)
def test_the_example_refuses_a_noise_schedule_that_it_does_not_have(exported, tmp_path) -> None:
    path = Path(shutil.copytree(exported[0], tmp_path / "copy")) / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for change in ({"rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}, {"timestep_spacing": "linspace"}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(SystemExit, match="a noise schedule that this program does not have"):
            ours(tmp_path / "copy", "a cat", 0)


def test_noise_of_lcm_is_new_at_every_step(exported, tmp_path) -> None:
    folder, teacher = exported
    how, random = Drawing(steps=3, guidance_scale=1, sampler="lcm"), np.random.default_rng(5)
    noise = [torch.from_numpy(random.standard_normal((1, 4, 8, 8), np.float32)) for _ in range(how.steps)]
    pipe, (first, *more) = set_sampler(teacher.pipeline(), "lcm"), noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: more.pop(0))
        drawn = pipe("a cat", num_inference_steps=3, guidance_scale=1, latents=first, height=16, width=16)
    assert levels_apart(ours(made_for(folder, tmp_path / "copy", how), "a cat", 5), drawn.images[0]) <= NEAR


@pytest.mark.processes
@pytest.mark.parametrize("exported", ["sd"], indirect=True)
def test_the_short_program_of_the_docs_draws_what_the_example_draws(exported, tmp_path) -> None:
    code = re.search(r"```python\n(.*?)```", (EXAMPLE.parents[2] / "docs" / "edge.md").read_text(), re.DOTALL)
    assert code is not None and code[1].count("\n") <= 30
    folder = made_for(exported[0], tmp_path / "copy", Drawing(steps=4, guidance_scale=1, sampler="ddim-trailing"))
    subprocess.run([sys.executable, "-c", code[1], folder, "a red cat", tmp_path / "drawn.png"], check=True)
    assert levels_apart(Image.open(tmp_path / "drawn.png"), ours(folder, "a red cat", 0)) <= 1


@pytest.mark.processes
@pytest.mark.parametrize("exported", ["sdxl"], indirect=True)  # a program that names what it imports: once is enough
def test_the_example_runs_without_torch(exported, tmp_path) -> None:
    picture = tmp_path / "picture.png"
    argv = [sys.executable, EXAMPLE, exported[0], "a cat", picture]
    told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert "torch is not imported" in told and Image.open(picture).size == (16, 16)


def test_the_readme_lists_the_inputs_of_the_models(exported) -> None:
    folder, teacher = exported
    readme, models = (folder / "README.md").read_text(), json.loads((folder / "onnx.json").read_text())["models"]
    assert f"`encoder_hidden_states [batch, tokens, {teacher.unet_config['cross_attention_dim']}]`" in readme
    assert all(model["apart"] < 1e-4 for model in models.values())
    with pytest.raises(UserError, match=r"a pipeline for ONNX Runtime, which .*prunet generate.* draws with: give the"):
        Teacher(folder)


@pytest.mark.parametrize("how", [Drawing(steps=3, guidance_scale=3), Drawing(steps=3, guidance_scale=1, sampler="lcm")])
def test_generate_draws_what_diffusers_draws_from_the_same_noise(exported, how, tmp_path) -> None:
    folder, teacher = exported
    how = how.model_copy(update={"sampler": "lcm" if how.sampler == "lcm" else "ddim"})
    copy, theirs = made_for(folder, tmp_path / "copy", how), draw(teacher.pipeline(), ["a cat"], [3], how, size=32)
    [drawn] = generate(copy, "a cat", seed=3, size=32)
    assert levels_apart(drawn, next(theirs)) <= NEAR
    with pytest.raises(UserError, match="draws only with"):
        generate(copy, "a cat", drawing=Drawing(sampler="euler"))
    (copy / "unet" / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot open it .* export it again"):
        generate(copy, "a cat")
    (copy / "unet" / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"no model\.onnx\.data beside it"):
        open_models([str(copy)])


@pytest.mark.processes
def test_bench_beside_torch(exported, capsys) -> None:
    folder, teacher = exported
    flags = ("--device", "cpu", "--precision", "no", "--repeats", "3", "--batch-size", "2", "--json")
    code, out, err = call(capsys, "bench", teacher.source, folder, *flags)
    assert code == 0, err
    torchs, ours = json.loads(out.splitlines()[-1])["models"].values()
    assert (ours["runtime"], ours["precision"], ours["macs"]) == ("onnx", "f32", torchs["macs"])
    assert ours["apart"] < NEAR / 255 and ours["process_mb"] > 1 and ours["weights_mb"] > 0.1


def test_a_run_with_a_small_decoder(run_folder, tmp_path, capsys) -> None:
    forms = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    torch.manual_seed(0)
    AutoencoderTiny(**forms, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    code, out, _ = call(capsys, "export", run_folder, "--onnx", "--decoder", tmp_path / "tiny", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0 and facts["output"] == str(run_folder / "onnx") and facts["decoder"] == "AutoencoderTiny"
    assert ours(run_folder / "onnx", "a cat", 0).size == (16, 16)
    code, _, err = call(capsys, "export", run_folder, "--openvino", "-o", run_folder / "onnx")
    assert code == 2 and "is an onnx of prunet, not an openvino" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--onnx", "--openvino"], "--openvino --onnx: one export at a time"),
        (["--onnx", "--int8"], "--onnx --int8: --int8 is for --openvino: leave one of them out"),
        (["--onnx", "--fp16"], "--fp16 is for a stock folder or --single-file"),
        (["--onnx", "--decoder", "none"], "none is not a decoder"),
    ],
)
def test_export_refuses(options, message, run_folder, capsys) -> None:
    before = sorted(run_folder.rglob("*"))
    code, _, err = call(capsys, "export", run_folder, *options)
    assert code == 2 and message in err and sorted(run_folder.rglob("*")) == before


def test_onnx_that_is_not_installed(run_folder, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = call(capsys, "export", run_folder, "--onnx")
    assert code == 2 and "onnxruntime, which is not installed: pip install 'prunet[onnx]'" in err
