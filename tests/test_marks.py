"""Marks of a single file about its prediction type, its config, and the marks that prunet writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunet import Teacher, UserError
from prunet.denoisers.unet2d.form import make_unet
from prunet.exports.single_file import export_single_file
from prunet.teacher.ldm import to_ldm
from prunet.teacher.marks import NOISE, PREDICTION, ZERO_SNR, read_marks, save_marked

V, EPSILON = "v_prediction", "epsilon"
TENSORS = {
    "v_pred": (PREDICTION, V),
    "ztsnr": (ZERO_SNR, True),
    "edm_mean": (NOISE, "EDM"),
    "edm_vpred.sigma_max": (NOISE, "EDM"),
}
METADATA = [  # as trainers and programs write them
    ({"modelspec.prediction_type": "v"}, (PREDICTION, V)),
    ({"modelspec.prediction_type": "epsilon"}, (PREDICTION, EPSILON)),
    ({"modelspec.prediction_type": "flow"}, (PREDICTION, "flow")),
    ({"modelspec.predict_key": "v"}, (PREDICTION, V)),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (PREDICTION, V)),
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, (PREDICTION, EPSILON)),
    ({"ss_base_model_version": "sd_v2_v"}, (PREDICTION, V)),
    ({"ss_v2": "True", "ss_v_parameterization": "True"}, (PREDICTION, V)),
    ({"ss_v_parameterization": "false"}, (PREDICTION, EPSILON)),
    ({"ss_zero_terminal_snr": "True"}, (ZERO_SNR, True)),
    ({"ss_zero_terminal_snr": "False"}, (ZERO_SNR, False)),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "v"}, None),
    (
        {"ss_zero_terminal_snr": "None", "modelspec.prediction_type": "", "ss_base_model_version": "sdxl_base_v1-0"},
        None,
    ),
    ({}, None),
]


@pytest.fixture(scope="module")
def single(sd, sdxl, tmp_path_factory):
    """Makes a single file of a teacher with these marks, and a config folder with a scheduler says something."""
    folder = tmp_path_factory.mktemp("marks")
    teachers = {kind: Teacher(source) for kind, source in (("sd", sd), ("sdxl", sdxl))}
    weights = {
        kind: to_ldm(t.unet, t.vae, **{name: t.text_part(name) for name in t.text_encoders})
        for kind, t in teachers.items()
    }

    def make(kind="sdxl", tensors=(), metadata=None, **scheduler) -> tuple[Path, Path]:
        marks = {name: torch.empty(0) if name in ("v_pred", "ztsnr") else torch.tensor(120.0) for name in tensors}
        save_file({**weights[kind], **marks}, folder / "file.safetensors", {"format": "pt", **(metadata or {})})
        shutil.rmtree(folder / "config", ignore_errors=True)
        source = sd if kind == "sd" else sdxl
        shutil.copytree(source, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
        config = folder / "config" / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **scheduler}))
        return folder / "file.safetensors", folder / "config"

    return make


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_marks(single, name) -> None:
    (mark,) = read_marks(single(tensors=[name])[0])
    assert (mark.field, mark.value) == TENSORS[name]
    assert name in mark.where


@pytest.mark.parametrize(("metadata", "said"), METADATA)
def test_metadata_that_are_marks(single, metadata, said) -> None:
    assert [(mark.field, mark.value) for mark in read_marks(single(metadata=metadata)[0])] == ([said] if said else [])


SAYING = [
    *[([name], {}, *said) for name, said in TENSORS.items()],
    *[([], metadata, *said) for metadata, said in METADATA if said],
]
OF_SD = (SAYING[0], SAYING[1], SAYING[4])  # a tensor of each field that a config has, and metadata


@pytest.mark.parametrize(
    ("kind", "tensors", "metadata", "field", "value"),
    [*[("sdxl", *case) for case in SAYING], *[("sd", *case) for case in OF_SD]],
)
def test_a_config_must_agree_with_the_marks(single, kind, tensors, metadata, field, value) -> None:
    """Whatever the mark: the config that agrees is taken; another is refused with both values and where they are."""
    where = [*tensors, *metadata][-1]
    configs = {PREDICTION: (EPSILON, V), ZERO_SNR: (False, True), NOISE: ("DDIMScheduler",)}
    for given in configs[field]:
        file, config = single(kind, tensors, metadata, **({} if field == NOISE else {field: given}))
        if given == value:
            assert Teacher(file, config=config).noise_scheduler.config[field] == value
            continue
        with pytest.raises(UserError) as error:
            Teacher(file, config=config)
        for word in (str(file), str(value), str(given), where, str(config)):
            assert word in str(error.value)
        assert "\n" not in str(error.value)
        if field != NOISE:
            assert f"{'an SDXL' if kind == 'sdxl' else 'an SD v1'} with a scheduler" in str(error.value)
            assert "stable-diffusion-2" not in str(error.value)


def test_the_configs_beside_a_file_are_compared_too(single, tmp_path) -> None:
    file, config = single(tensors=["v_pred"])
    shutil.copy(file, tmp_path / "mine.safetensors")
    shutil.copytree(config, tmp_path / "mine.config")
    with pytest.raises(
        UserError, match=r"prediction_type is v_prediction by its tensor v_pred, and epsilon by the sched"
    ):
        Teacher(tmp_path / "mine.safetensors")


def test_a_scheduler_without_the_fields_means_epsilon_and_no_zero_snr(single) -> None:
    file, config = single(metadata={"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"})
    path = config / "scheduler" / "scheduler_config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k not in (PREDICTION, ZERO_SNR)}
    path.write_text(json.dumps(fields))
    assert Teacher(file, config=config).layout == "sdxl"


def test_a_file_that_contradicts_itself_is_refused(single) -> None:
    file, config = single(tensors=["v_pred"], metadata={"modelspec.prediction_type": "epsilon"}, prediction_type=V)
    with pytest.raises(
        UserError, match=r"two things about its prediction_type: v_prediction .*v_pred\) and epsilon \(models"
    ):
        Teacher(file, config=config)


SMALL = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 2}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Writes only a U-Net of a layout, without configs; its size does not matter here."""
    monkeypatch.setattr("prunet.teacher.ldm.has_unet", lambda *args: True)
    monkeypatch.setattr("prunet.teacher.ldm.lacks", lambda *args: None)

    def make(layout: str, tensors=(), metadata=None) -> Path:
        widths = {"sd-v1": 768, "sd-v2": 1024, "sdxl": 2048}
        more = {"use_linear_projection": layout != "sd-v1"}
        if layout == "sdxl":
            more |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
            more |= {"projection_class_embeddings_input_dim": 64}
        unet = make_unet({**SMALL, **more, "cross_attention_dim": widths[layout]})
        marks = {name: torch.empty(0) for name in tensors}
        save_file({**to_ldm(unet, None, None), **marks}, tmp_path / "bare.safetensors", metadata)
        return tmp_path / "bare.safetensors"

    return make


def test_a_bare_file_is_compared_with_the_configs_that_it_would_get(bare) -> None:
    epsilon, v = ({"modelspec.prediction_type": word} for word in ("epsilon", "v"))
    for layout in ("sd-v1", "sdxl"):
        assert Teacher(bare(layout)).layout == layout
        assert Teacher(bare(layout, metadata=epsilon)).layout == layout
    with pytest.raises(UserError, match="SD v2 checkpoint that does not say what it predicts"):
        Teacher(bare("sd-v2"))
    assert Teacher(bare("sd-v2", metadata=epsilon)).kind == "sd"
    for layout, label in (("sd-v1", "SD v1"), ("sd-v2", "SD v2"), ("sdxl", "SDXL")):
        with pytest.raises(UserError, match=f"give with --config .* an {label} with a scheduler") as error:
            Teacher(bare(layout, metadata=v))
        assert ("stabilityai/stable-diffusion-2-1" in str(error.value)) == (layout == "sd-v2")
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr: true"):
        Teacher(bare("sdxl", ["ztsnr"]))
    with pytest.raises(UserError, match="EDM's noise by its tensor edm_std"):
        Teacher(bare("sdxl", ["edm_std"]))


@pytest.mark.parametrize(
    ("kind", "prediction", "zero_snr"), [("sd", EPSILON, False), ("sd", V, False), ("sdxl", V, True)]
)
def test_exports_are_marked_with_what_they_predict(kind, prediction, zero_snr, request, tmp_path) -> None:
    """In the tensors that ComfyUI looks for and in ModelSpec's metadata; prunet reads them back as no disagreement."""
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "teacher"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    said = {PREDICTION: prediction, ZERO_SNR: zero_snr}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | said))
    path = export_single_file(folder, tmp_path / "mine.safetensors")
    tensors = load_file(path)
    assert ("v_pred" in tensors, "ztsnr" in tensors) == (prediction == V, zero_snr)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1" if kind == "sd" else "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "sgm",
        "modelspec.title": "mine",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "v" if prediction == V else "epsilon",
    }
    again = Teacher(path).noise_scheduler.config
    assert (again.prediction_type, again.rescale_betas_zero_snr) == (prediction, zero_snr)
    if kind == "sdxl":  # stock diffusers does not mind the marks
        config = str(tmp_path / "mine.config")
        stock = StableDiffusionXLPipeline.from_single_file(str(path), config=config, local_files_only=True)
        expected = Teacher(folder).unet.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in stock.unet.state_dict().items())
        assert stock.scheduler.config.prediction_type == prediction


def test_the_bytes_do_not_depend_on_the_order_of_a_hash_table(tmp_path) -> None:
    metadata = {f"key {i}": 'a "quoted" ü' for i in range(40)}
    for name in "ab":
        save_marked({"x": torch.ones(3), "v_pred": torch.empty(0)}, metadata, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("x"), torch.ones(3))
