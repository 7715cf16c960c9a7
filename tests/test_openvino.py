"""Pipelines for OpenVINO: they draw what diffusers draws, without torch, in 16 and in 8 bits."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import levels_apart
from diffusers import AutoencoderTiny
from PIL import Image
from test_cli import call

from prunet import Teacher, UserError, generate
from prunet.exports.openvino import export_openvino
from prunet.exports.traced import open_decoder
from prunet.play.models import Asked, open_players
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw
from prunet.sampling.made_for import write_made_for
from prunet.sampling.openvino import OpenVinoPipeline
from prunet.sampling.start import StartPicture

PROMPTS = ["a red cat", "two dogs"]
#: openvino_genai cuts pixels down to whole numbers, diffusers rounds them.
NEAR, NEAR_IN_BF16 = 2, 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder") / "tiny"
    forms = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**forms, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher, Drawing]:
    """SD's layout with a small decoder and for few steps, and SDXL's unchanged."""
    source = request.getfixturevalue(request.param)
    folder, teacher = tmp_path_factory.mktemp("openvino") / "folder", Teacher(source)
    how = Drawing(steps=2, guidance_scale=3, sampler="pndm")
    decoder = None
    if request.param == "sd":
        how = Drawing(steps=3, guidance_scale=1, sampler="ddim-trailing")
        decoder = request.getfixturevalue("tiny")
        teacher.__dict__["vae"] = AutoencoderTiny.from_pretrained(decoder)
    facts = export_openvino(source, folder, PROMPTS, how, decoder=decoder, card={"teacher": "sd"})
    assert facts["psnr"] > 30 and facts["prompts"] == 2
    return folder, teacher, how


@pytest.mark.processes
def test_draws_what_diffusers_draws_from_the_same_noise(exported) -> None:
    folder, teacher, how = exported
    ours, rounded, pipe = OpenVinoPipeline(folder, "f32"), OpenVinoPipeline(folder, "bf16"), teacher.pipeline()
    assert (ours.made_for, ours.native_size) == (how, teacher.native_size)
    for size in (teacher.native_size, 2 * teacher.native_size):
        theirs = list(draw(pipe, PROMPTS, [3, 4], how, size=size))
        for a, b in zip(ours.draw(PROMPTS, [3, 4], how, size), theirs, strict=True):
            assert levels_apart(a, b) <= NEAR
        for a, b in zip(rounded.draw(PROMPTS, [3, 4], how, size), theirs, strict=True):
            assert levels_apart(a, b) <= NEAR_IN_BF16


@pytest.mark.processes
def test_draws_what_diffusers_draws_with_noise_at_every_step(exported, tmp_path) -> None:
    folder, teacher, how = exported
    lcm = how.model_copy(update={"sampler": "lcm"})
    shutil.copytree(folder, tmp_path / "lcm")
    write_made_for(tmp_path / "lcm", lcm)
    theirs = draw(teacher.pipeline(), PROMPTS, [3, 4], lcm, size=teacher.native_size)
    for a, b in zip(OpenVinoPipeline(tmp_path / "lcm", "f32").draw(PROMPTS, [3, 4], lcm), theirs, strict=True):
        assert levels_apart(a, b) <= NEAR


@pytest.mark.processes
def test_the_code_in_its_readme_draws_without_torch(exported, tmp_path) -> None:
    folder = exported[0]
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    program = code[1].replace("PATH_OF_THIS_FOLDER", str(folder)).replace("rng_seed=0", "num_images_per_prompt=2")
    program += "import sys\nassert 'torch' not in sys.modules, 'torch'\nassert picture.data.shape[0] == 2\n"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "picture.png").size == (16, 16)


@pytest.mark.processes
def test_the_example_draws_within_two_gigabytes(exported, tmp_path) -> None:
    script = Path(__file__).parent.parent / "examples" / "edge" / "limited.sh"
    picture = tmp_path / "picture.png"
    told = subprocess.run(
        ["sh", script, exported[0], "a cat", picture],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Image.open(picture).size == (16, 16)
    assert "torch is not imported" in told.stdout and re.search(r"peak memory \d+ MB", told.stdout)


@pytest.mark.processes
@pytest.mark.parametrize("bits", ["int8", "int8-weights"])
def test_eight_bits(bits, run_folder, tmp_path, capsys) -> None:
    code, out, _ = call(capsys, "export", str(run_folder), "--openvino", f"--{bits}", "--json")
    facts = json.loads(out.splitlines()[-1])
    folder = run_folder / f"openvino-{bits}"
    assert code == 0 and facts["output"] == str(folder) and facts["bits"] == bits
    weights = sum(p.numel() for p in Teacher(run_folder / "pipeline").unet.parameters())
    assert (folder / "unet" / "openvino_model.bin").stat().st_size < 1.5 * weights  # 16 bits are 2 bytes each
    text = Teacher(run_folder / "pipeline").text_part("text_encoder")
    weights = sum(p.numel() for p in text.parameters())
    assert (folder / "text_encoder" / "openvino_model.bin").stat().st_size < 1.5 * weights
    types = re.findall(r'type="(\w+)"', (folder / "unet" / "openvino_model.xml").read_text())
    assert ("FakeQuantize" in types) == (bits == "int8")
    if bits == "int8":
        assert facts["error"][1] <= facts["error"][0] < 0.1
        assert {"conv_in", "conv_out"} <= {*facts["kept"]}
    assert f"{facts['psnr']:.1f} dB" in (folder / "README.md").read_text()
    code, _, _ = call(
        capsys, "generate", str(folder), "a cat", "-o", str(tmp_path / "a.png"), "--steps", "1", "--seed", "7"
    )
    assert code == 0 and Image.open(tmp_path / "a.png").size == (16, 16)


@pytest.mark.processes
def test_bench_and_play_beside_torch(exported, tmp_path, capsys) -> None:
    folder, teacher, how = exported
    flags = ("--device", "cpu", "--precision", "no", "--repeats", "3", "--batch-size", "2", "--steps", "2", "--json")
    code, out, err = call(capsys, "bench", teacher.source, folder, *flags, "-o", tmp_path / "out")
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    torchs, ours = facts["models"].values()
    assert (torchs["runtime"], ours["runtime"], ours["precision"]) == ("torch", "openvino", "f32")
    assert (ours["parameters"], ours["macs"], ours["steps"]) == (torchs["parameters"], torchs["macs"], 2)
    assert (ours["rows"], torchs["rows"]) == (how.rows, 2)
    # The pictures of a folder with another decoder than the teacher's are far from the teacher's.
    assert "apart" not in torchs and (ours["apart"] < NEAR / 255) == (teacher.kind == "sdxl")
    assert ours["process_mb"] > 1 and torchs["process_mb"] > 1
    first, second = facts["rows"]
    assert (first["mode"], second["mode"], second["batch_size"]) == ("eager", "openvino", 2)
    assert second["seconds"] == pytest.approx((second["text_ms"] + 2 * second["denoiser_ms"] + second["vae_ms"]) / 1000)
    assert second["speed_up"] == pytest.approx(first["denoiser_ms"] / second["denoiser_ms"])
    players = open_players([teacher.source, str(folder)], device="cpu", dtype=torch.float32)
    size = teacher.native_size
    drawn = players[1].draw(Asked("a cat", 3, size, Drawing()))
    assert drawn.picture.tobytes() == generate(folder, "a cat", seed=3)[0].tobytes() and drawn.drawing == how
    with pytest.raises(UserError, match="draws without picture to start from: leave it out"):
        players[1].draw(Asked("a cat", 3, size, Drawing(), start=StartPicture(Image.new("RGB", (16, 16)))))
    for args, message in (
        (("bench", folder, "--plan", "bk-tiny"), "is for OpenVINO: give it second"),
        (("bench", folder, "--size", "12"), "size: 12 is not a multiple of"),
    ):
        code, _, err = call(capsys, *args, "--device", "cpu")
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int8"], "--int8: needs --openvino"),
        (["--decoder", "x"], "--decoder: needs --openvino or --onnx"),
        (
            ["--openvino", "--fp16"],
            "--openvino --fp16: --fp16 is for a stock folder or --single-file: leave one of them out",
        ),
        (["--openvino", "--int8", "--int8-weights"], "choose one"),
        (["--openvino", "--decoder", "none"], "none is not a decoder"),
    ],
)
def test_export_refuses(options, message, run_folder, capsys) -> None:
    code, _, err = call(capsys, "export", str(run_folder), *options)
    assert code == 2 and message in err


@pytest.mark.processes
def test_a_folder_draws_only_as_it_can(exported) -> None:
    folder = exported[0]
    with pytest.raises(UserError, match=r"a pipeline for OpenVINO.*give the folder or run"):
        Teacher(folder)
    with pytest.raises(UserError, match=r"sampler: .* draws only with"):
        generate(folder, "a cat", drawing=Drawing(sampler="euler"))
    with pytest.raises(UserError, match="draws without image"):
        generate(folder, "a cat", start=StartPicture(Image.new("RGB", (16, 16))))
    with pytest.raises(UserError, match="not a multiple of"):
        generate(folder, "a cat", size=12)


def test_decoders_of_other_latents_are_refused(sd, tiny, tmp_path) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(UserError, match="diffusers cannot open this AutoencoderTiny"):
        open_decoder(tmp_path / "other", Teacher(sd))
    AutoencoderTiny(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError, match=r"1/8 of the side, those of .* have 4 channels of 1/2"):
        open_decoder(tmp_path / "larger", Teacher(sd))
    with pytest.raises(UserError, match=r"a UNet2DConditionModel: give an AutoencoderTiny"):
        open_decoder(sd / "unet", Teacher(sd))


def test_a_folder_that_is_not_whole_is_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "openvino_model.xml").touch()
    with pytest.raises(UserError, match=r"no file .*index.json: export it again with `prunet export RUN --openvino`$"):
        generate(tmp_path, "a cat")
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(UserError, match=r"openvino_genai, which is not installed: pip install 'prunet\[openvino\]'"):
        generate(tmp_path, "a cat")
