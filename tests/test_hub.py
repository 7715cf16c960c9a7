"""Teachers from the hub and students uploaded to it, through a server with the hub's API."""

import json
import shutil

import huggingface_hub.constants as constants
import pytest
import yaml
from hub_server import Hub, serve
from test_cli import call, recipe

from prunet import Teacher, UserError
from prunet.exports.hub import check_push
from prunet.runs.new import license_of
from prunet.student.folder import load_unet

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


def test_a_teacher_is_of_one_commit_though_its_branch_moves_on(hub: Hub, sd, sdxl, monkeypatch) -> None:
    first = hub.commit("owner/sd", sd)
    teacher = Teacher("owner/sd")
    assert teacher.commit == first and teacher.hub_id == "owner/sd"
    hub.commit("owner/sd", sdxl)  # as if another model was pushed while a run downloads
    assert teacher.fingerprint() == Teacher(sd).fingerprint()
    teacher.check_weights()
    assert not any("safetensors" in path and first not in path for path, _ in hub.requests)
    assert Teacher("owner/sd", revision=first).unet_config == teacher.unet_config
    assert Teacher("owner/sd").kind == "sdxl"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert Teacher("owner/sd", revision=first).fingerprint() == Teacher(sd).fingerprint()
    assert len(hub.requests) == asked


def test_a_download_that_is_cut_off_resumes(hub: Hub, sd, monkeypatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.commit("owner/sd", sd)
    hub.cut = {UNET}
    teacher = Teacher("owner/sd")
    assert teacher.weight_files("unet")[0].read_bytes() == (sd / UNET).read_bytes()
    assert any(path.endswith(UNET) and given for path, given in hub.requests), "it began again instead of resuming"


def test_something_missing_is_one_line_that_tells_what_to_do(hub: Hub, sd, tmp_path) -> None:
    hub.commit("owner/sd", sd)
    hub.commit("owner/gated", sd)
    hub.gated = {"owner/gated"}
    shutil.copytree(sd, tmp_path / "less")
    (tmp_path / "less" / UNET).unlink()
    hub.commit("owner/less", tmp_path / "less")
    for words, wrong in (
        ("check the name", lambda: Teacher("owner/none")),
        ("no such revision: check teacher.revision", lambda: Teacher("owner/sd", revision="a" * 40)),
        ("is gated: accept its terms", lambda: Teacher("owner/gated")),
        ("owner/less: no unet/", lambda: Teacher("owner/less").check_weights()),
    ):
        with pytest.raises(UserError, match=words) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_a_run_keeps_the_commit_and_its_student_goes_to_the_hub(
    hub: Hub, sd, pictures, tmp_path, capsys, monkeypatch
) -> None:
    first = hub.commit("owner/sd", sd)
    path = recipe(tmp_path, "owner/sd", pictures, sheet={"every": 0})
    assert call(capsys, "run", path, "--device", "cpu", "--set", "stages.0.steps=1")[0] == 0
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["teacher"]
    assert kept == {"source": "owner/sd", "config": None, "revision": first}
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert f"`owner/sd` at commit `{first}`" in card and 'base_model: "owner/sd"' in card
    hub.add("owner/sd", {"model_index.json": b"{}"})  # the run still reads the commit that it started with
    code, out, err = call(capsys, "run", tmp_path / "run", "--device", "cpu")
    assert code == 0 and "→" not in err, err

    push = ("export", tmp_path / "run", "--push", "owner/small")
    code, _, err = call(capsys, *push)
    assert code == 2 and "hf auth login" in err and "owner/small" not in hub.repositories
    hub.token = "written-for-this-test"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.role = "read"
    code, _, err = call(capsys, *push)
    assert code == 2 and "may only read" in err and "owner/small" not in hub.repositories
    hub.role = "write"
    code, out, err = call(capsys, *push, "--json")
    assert code == 0, err
    ((sha, files),) = hub.repositories["owner/small"]
    assert json.loads(out.splitlines()[-1])["pushed"].endswith(sha) and hub.private["owner/small"]
    assert files["README.md"].decode() == card and ".prunet.json" not in files
    student = Teacher("owner/small")
    assert student.unet.state_dict().keys() == load_unet(tmp_path / "run" / "stage-1" / "unet").state_dict().keys()
    code, _, err = call(capsys, *push, "--single-file")
    assert code == 0, err
    files = hub.repositories["owner/small"][-1][1]
    assert {"student.safetensors", "student.config/model_index.json", "student.config/unet/config.json"} <= files.keys()
    assert files["README.md"].decode() == card and "student.config/.prunet.json" not in files


def test_the_licence_of_a_model_card_is_found(hub: Hub, sd, tmp_path) -> None:
    hub.commit("owner/sd", sd)
    assert license_of(Teacher("owner/sd")) is None
    shutil.copytree(sd, tmp_path / "with-card")
    (tmp_path / "with-card" / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    hub.commit("owner/with-card", tmp_path / "with-card")
    assert license_of(Teacher("owner/with-card")) == "openrail++"


@pytest.mark.parametrize("name", ["small", "owner/", "a/b/c"])
def test_a_wrong_repository_name_is_refused(name) -> None:
    with pytest.raises(UserError, match="owner/name"):
        check_push(name)
