"""DreamBooth: the loss is the plain one, resume equals uninterrupted, and stock diffusers loads what comes out."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import dies_after_checkpoint
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from prunet import Runtime, Teacher, UserError, cli, personalize
from prunet.adapters.adapt import LORA_FILE
from prunet.adapters.lora_file import write_lora
from prunet.denoisers.condition import Condition
from prunet.disk.files import read_json, write_json
from prunet.recipe.personalization import personalization
from prunet.runs.personalization import Personal
from prunet.student.student import state_hash
from prunet.training.fit import training_memory
from prunet.training.lora import add_lora, is_target, lora_layers, trained_count
from prunet.training.objectives.personalization import Personalization as Objective
from prunet.training.samples import batches

CPU = Runtime(device="cpu", precision="no", log_every=1)
FEW = {
    "steps": 4,
    "batch_size": 2,
    "class_pictures": 2,
    "guidance_scale": 1,
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
}
PROMPTS = {"prompt": "a photo of sks dog", "class_prompt": "a photo of dog"}


def spec_of(model: Path, pictures: Path, output: Path, **values):
    given = {"model": str(model), "pictures": str(pictures), "output": str(output), "sheet_every": 0}
    return personalization(**given | FEW | PROMPTS | values)


@pytest.fixture(scope="module")
def dog(pictures, tmp_path_factory) -> Path:
    """Three pictures, without captions."""
    folder = tmp_path_factory.mktemp("subject") / "dog"
    folder.mkdir()
    for name in ("000", "001", "002"):
        shutil.copyfile(pictures / f"{name}.png", folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def lora(sd, dog, tmp_path_factory) -> Path:
    """A finished LoRA; not to be written to."""
    output = tmp_path_factory.mktemp("lora") / "dog"
    personalize(spec_of(sd, dog, output, lora=2, sheet_every=4), CPU)
    return output


def losses(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@pytest.mark.parametrize("kind", ["sd", "sd_v", "sdxl"])
def test_the_loss_is_that_of_two_separate_batches(kind, request, dog, tmp_path) -> None:
    model = request.getfixturevalue(kind)
    this = Personal(spec_of(model, dog, tmp_path / "out", prior_weight=0.3), CPU)
    samples, teacher = this._samples(), Teacher(model)
    batch = next(batches(samples, 0, 2))
    objective, scheduler = Objective(teacher, 0.3), teacher.noise_scheduler

    def plain(prefix: str) -> torch.Tensor:
        latents, noise, time = (batch[prefix + name] for name in ("latents", "noise", "timestep"))
        target = scheduler.get_velocity(latents, noise, time) if kind == "sd_v" else noise
        told = Condition(batch[f"{prefix}condition"])
        added = {"text_embeds": told["pooled"], "time_ids": told["time_ids"]} if kind == "sdxl" else None
        noisy = scheduler.add_noise(latents, noise, time)
        out = teacher.unet(noisy, time, told["prompt_embeds"], added_cond_kwargs=added).sample
        return F.mse_loss(out, target)

    loss, terms = objective(teacher.unet, batch)
    assert torch.allclose(terms, torch.stack([plain(""), plain("class_")]), rtol=1e-4)
    assert torch.allclose(loss, plain("") + 0.3 * plain("class_"), rtol=1e-4)
    assert not torch.equal(batch["noise"], batch["class_noise"])


@pytest.mark.parametrize("rank", [None, 2])
def test_stopped_and_resumed_equals_uninterrupted(rank, sd, dog, tmp_path) -> None:
    whole = personalize(spec_of(sd, dog, tmp_path / "whole", lora=rank), CPU)
    with dies_after_checkpoint(2):
        personalize(spec_of(sd, dog, tmp_path / "parts", lora=rank), CPU)
    drawn = sorted((tmp_path / "parts" / "class").iterdir())
    before = [path.stat().st_mtime_ns for path in drawn]
    parts = personalize(spec_of(sd, dog, tmp_path / "parts", lora=rank), CPU)
    assert [path.stat().st_mtime_ns for path in drawn] == before
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(parts / file), load_file(whole / file)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys()), file
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert personalize(spec_of(sd, dog, tmp_path / "parts", lora=rank), CPU) == parts  # it is not trained again


def test_a_missing_picture_of_the_class_alone_is_drawn_again(lora, sd, dog, tmp_path) -> None:
    output = shutil.copytree(lora, tmp_path / "again")
    kept, gone = (output / "class" / f"{number:06d}.png" for number in (0, 1))
    bytes_before, when = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    Personal(spec_of(sd, dog, output, lora=2), CPU)._draw_class(PROMPTS["class_prompt"])
    assert (gone.read_bytes(), kept.stat().st_mtime_ns) == (bytes_before, when)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_lora_leaves_the_model_and_gives_stock_diffusers_what_was_trained(kind, dog, tmp_path, request) -> None:
    model = request.getfixturevalue(kind)
    this = Personal(spec_of(model, dog, tmp_path / "out", lora=2), CPU)
    net = this._train(this._samples())
    base = {name.replace(".base_layer", ""): value for name, value in net.state_dict().items() if "lora_" not in name}
    stored = Teacher(model).unet.state_dict()
    assert base.keys() == stored.keys()
    assert all(torch.equal(base[name], stored[name]) for name in stored)
    layers = lora_layers(net)
    assert layers and all(up.abs().max() > 0 for _, up in layers.values())
    assert sum(down.numel() + up.numel() for down, up in layers.values()) == trained_count(this.model.unet_config, 2)

    this._write(net, "made")
    cls = StableDiffusionPipeline if kind == "sd" else StableDiffusionXLPipeline
    pipe = cls.from_pretrained(model)
    pipe.load_lora_weights(tmp_path / "out" / "lora")
    how = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    drawn = pipe("a photo of sks dog", generator=torch.Generator().manual_seed(0), **how).images
    ours = cls(**{**pipe.components, "unet": net})(
        "a photo of sks dog", generator=torch.Generator().manual_seed(0), **how
    )
    plain = cls.from_pretrained(model)("a photo of sks dog", generator=torch.Generator().manual_seed(0), **how).images
    assert torch.allclose(drawn, ours.images, atol=1e-4 * float(drawn.abs().max()))
    assert not torch.allclose(drawn, plain, atol=1e-3 * float(drawn.abs().max()))


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"micro_batch": 1}])
def test_how_it_is_computed_changes_no_more_than_rounding(how, lora, sd, dog, tmp_path) -> None:
    output = shutil.copytree(lora, tmp_path / "again", ignore=shutil.ignore_patterns("training", "lora"))
    made = personalize(spec_of(sd, dog, output, lora=2), dataclasses.replace(CPU, **how))
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (made, lora / "lora"))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-2, atol=1e-4) for key in ours.keys() | theirs.keys())


def test_a_model_of_another_noise_schedule_is_another_model(lora, sd, dog, tmp_path) -> None:
    """What was trained for one target is not done, and not resumed, for another."""
    model, output = shutil.copytree(sd, tmp_path / sd.name), shutil.copytree(lora, tmp_path / "dog")
    label = read_json(output / "personalization.json")
    del label["inputs"]["noise schedule"]
    write_json(output / "personalization.json", label)  # as older versions wrote it
    this = Personal(spec_of(model, dog, output, lora=2, sheet_every=4), CPU)
    this.check()
    before = (output / "lora" / LORA_FILE).stat().st_mtime_ns
    assert (this.finish() / LORA_FILE).stat().st_mtime_ns == before
    write_json(output / "personalization.json", {"inputs": this._inputs})
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    with pytest.raises(UserError, match=r"noise schedule.prediction_type epsilon, now v_prediction: give another"):
        Personal(spec_of(model, dog, output, lora=2), CPU).check()


def test_names_of_a_lora_are_those_that_comfyui_reads(lora, sd) -> None:
    """ComfyUI's rule (comfy/lora.py): `lora_unet_` and the layer's name in diffusers, with underscores."""
    state = load_file(lora / "lora" / "pytorch_lora_weights.safetensors")
    known = {f"lora_unet_{name.replace('.', '_')}" for name, _ in Teacher(sd).unet.named_modules()}
    found: dict[str, set[str]] = {}
    for key in state:
        layer, _, role = key.partition(".")
        found.setdefault(layer, set()).add(role)
    assert found.keys() <= known
    assert all(roles == {"lora_down.weight", "lora_up.weight", "alpha"} for roles in found.values())


def test_a_lora_with_other_numbers_is_noticed_before_it_is_there(lora, sd, dog, tmp_path, monkeypatch) -> None:
    def write_other(layers, path, *rest):
        write_lora({name: (down, up + 1) for name, (down, up) in layers.items()}, path, *rest)

    output = shutil.copytree(lora, tmp_path / "other")
    shutil.rmtree(output / "lora")
    monkeypatch.setattr("prunet.runs.personalization.write_lora", write_other)
    with pytest.raises(RuntimeError, match="computes something else"):
        personalize(spec_of(sd, dog, output, lora=2, sheet_every=4), CPU)
    assert not (output / "lora").exists()


def test_files_beside_the_lora(lora) -> None:
    assert sorted(path.name for path in (lora / "training" / "sheets").iterdir()) == [
        "step-0000000.png",
        "step-0000004.png",
    ]
    assert [set(row) >= {"loss", "subject", "prior", "grad_norm"} for row in losses(lora)] == [True] * 4
    card = (lora / "lora" / "README.md").read_text()
    assert "`a photo of sks dog`" in card and "load_lora_weights" in card and "2 pictures of `a photo of dog`" in card
    (checkpoint,) = sorted((lora / "training" / "checkpoints").iterdir())[-1:]
    assert all("lora_" in name for name in load_file(checkpoint / "student.safetensors"))


def test_a_full_personalisation_is_a_stock_pipeline_and_can_be_personalised_again(sd, dog, tmp_path) -> None:
    before = state_hash(Teacher(sd).unet)
    values = {"class_prompt": None, "class_pictures": None, "steps": 2}
    first = personalize(spec_of(sd, dog, tmp_path / "first", **values), CPU)
    pipe = StableDiffusionPipeline.from_pretrained(first)
    assert state_hash(pipe.unet) != before == state_hash(Teacher(sd).unet)
    assert "from_pretrained" in (first / "README.md").read_text()
    assert "prior" not in losses(tmp_path / "first")[0]
    assert personalize(spec_of(first, dog, tmp_path / "second", **values), CPU).is_dir()


def test_student_of_a_run(finished, dog, tmp_path) -> None:
    made = personalize(spec_of(finished, dog, tmp_path / "out", lora=2, class_prompt=None, class_pictures=None), CPU)
    pipe = StableDiffusionPipeline.from_pretrained(finished / "pipeline")
    names = {name for name, _ in pipe.unet.named_modules() if is_target(name)}
    pipe.load_lora_weights(made)
    assert names and {name for name, layer in pipe.unet.named_modules() if hasattr(layer, "lora_A")} == names


def test_defaults_are_those_of_diffusers_scripts() -> None:
    where = {"model": "m", "pictures": "p", "output": "o", "prompt": "sks dog"}
    paces = [
        ({}, (400, 5e-6, 1)),
        ({"class_prompt": "dog"}, (800, 5e-6, 1)),
        ({"lora": 4}, (500, 1e-4, 1)),
        ({"lora": 4, "steps": 7, "learning_rate": 0.5}, (7, 0.5, 1)),
    ]
    for values, pace in paces:
        spec = personalization(**where, **values)
        assert (spec.steps, spec.learning_rate, spec.batch_size) == pace


def test_memory_of_a_lora_is_that_of_what_is_trained(sd, dog, tmp_path) -> None:
    this, full = (Personal(spec_of(sd, dog, tmp_path / "out", lora=rank), CPU) for rank in (2, None))
    config = this.derived.student_config
    net = add_lora(this.derived.architecture.make(config), 2, 0)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    cost = this.estimate()["memory_bytes"]
    assert (cost["gradients"], cost["optimizer"], cost["teacher"]) == (4 * trained, 8 * trained, 0)
    assert cost["total"] < full.estimate()["memory_bytes"]["total"]
    assert not (tmp_path / "out").exists()
    one, two = (
        training_memory(config, config, (8, 8), 1, spec, CPU)["activations"]
        for spec in (spec_of(sd, dog, tmp_path, class_prompt=None, class_pictures=None), spec_of(sd, dog, tmp_path))
    )
    assert two == 2 * one


def refused(argv: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["prunet", "personalize", *argv])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len([line for line in told if line.startswith("error")]) == 1, told
    return told[-1]


def test_bad_inputs_are_one_line(sd, dog, lora, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(dog, tmp_path / "broken")
    (broken / "cut.png").write_bytes((dog / "000.png").read_bytes()[:60])
    out = ["-o", str(tmp_path / "out"), "--device", "cpu", "--precision", "no"]
    usual = [str(sd), "--pictures", str(dog), "--prompt", "sks dog"]
    cases = {
        "'class_prompt' is the prompt itself": [*usual, "--class-prompt", " sks dog", *out],
        "prompt: String should have at least 1": [*usual[:-1], "  ", *out],
        "no pictures in it": [str(sd), "--pictures", str(tmp_path / "empty"), "--prompt", "sks dog", *out],
        "no such folder": [str(sd), "--pictures", str(tmp_path / "none"), "--prompt", "sks dog", *out],
        "cut.png": [str(sd), "--pictures", str(broken), "--prompt", "sks dog", *out],
        "empty": [str(tmp_path / "empty"), "--pictures", str(dog), "--prompt", "sks dog", *out],
        "prompt": [str(sd), "--pictures", str(dog), "--prompt", "", *out],
        "class_pictures": [*usual, "--class-pictures", "5", *out],
        "give 8 at most": [*usual, "--lora", "9", *out],
        "--size": [*usual, "--size", "20", *out],
        "learning_rate": [*usual, "--learning-rate", "0", *out],
        "lies in": [*usual, "-o", str(dog / "out"), "--device", "cpu"],
        "holds a personalisation with": [*usual, "--lora", "2", "-o", str(lora), "--device", "cpu"],
    }
    for what, argv in cases.items():
        assert what in refused(argv, capsys, monkeypatch), what
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("prunet.runs.personalization.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        assert "checkpoints need about" in refused([*usual, *out], capsys, monkeypatch)
    other = shutil.copytree(dog, tmp_path / "other")
    (other / "002.png").unlink()
    with pytest.raises(UserError, match="holds a personalisation with pictures"):
        Personal(spec_of(sd, other, lora, lora=2), CPU).check()
