"""The guidance scale as an input of the student: loss, first weights, stock pipelines, resume, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dies_after_checkpoint, levels_apart
from diffusers import DiffusionPipeline, UNet2DConditionModel
from test_few_steps import CPU, PACE, batch_of, first_row
from test_onnx import NEAR
from test_onnx import ours as drawn_by_the_example

from prunet import Teacher, UserError, distil, export, generate, load_recipe, run
from prunet.data.encoding import cache
from prunet.denoisers.unet2d.guidance import WEIGHT, guidance_embedding
from prunet.exports.coreml import export_coreml
from prunet.exports.onnx import export_onnx
from prunet.exports.openvino import export_openvino
from prunet.exports.single_file import export_single_file
from prunet.plan.derived import derive
from prunet.plan.plan import load_plan
from prunet.play.models import Asked, open_players
from prunet.recipe.personalization import Personalization
from prunet.recipe.recipe import Data
from prunet.recipe.stage import Losses, Stage
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.runs.personalization import Personal
from prunet.sampling.made_for import made_for
from prunet.sampling.onnx import OnnxPipeline
from prunet.sampling.openvino import OpenVinoPipeline
from prunet.speed.models import drawings
from prunet.student.student import cut, inherit, state_hash
from prunet.training.checkpoints import Saving
from prunet.training.samples import Samples

STAGE = Stage(objective="guidance", guidance_scale=(1.0, 8.0), losses=Losses(task=0), **PACE)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def made(request, pictures, tmp_path_factory):
    """A teacher, its latents, and its student that takes the guidance scale."""
    teacher = Teacher(request.getfixturevalue(request.param))
    latents = cache(teacher, Data(source=str(pictures)), tmp_path_factory.mktemp("latents"), seed=1)
    plan = load_plan("bk-small" if teacher.kind == "sd" else "ssd-1b")
    return teacher, latents, derive(teacher.unet_config, plan, guidance=True)


def call_unet(net, noisy, t, condition, **more):
    extra = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if "pooled" in condition else None
    return net(noisy, t, condition["prompt_embeds"], added_cond_kwargs=extra, **more).sample


def test_before_training_it_computes_what_the_student_without_it_computes(made) -> None:
    teacher, latents, derived = made
    plain = derive(teacher.unet_config, derived.plan)
    ours, theirs = (inherit(teacher.unet, each) for each in (derived, plain))
    t = torch.tensor([400] * 4)
    noisy, condition = batch_of(Samples(latents, STAGE, 5, teacher.process), ("noise",))
    embedded = guidance_embedding(condition["guidance_scale"])
    with torch.no_grad():
        drawn = call_unet(ours, noisy, t, condition, timestep_cond=embedded)
        assert torch.equal(drawn, call_unet(theirs, noisy, t, condition))
    assert derived.student_size.parameters == sum(p.numel() for p in ours.parameters())
    assert derived.student_size.parameters - plain.student_size.parameters == ours.get_parameter(WEIGHT).numel()
    assert derived.weight_map == plain.weight_map
    # A later plan keeps what the layer learned; a stage without it gives it nothing to keep.
    ours.get_parameter(WEIGHT).fill_(1.0)
    assert cut(ours, derived, derived).get_parameter(WEIGHT).mean() == 1
    assert cut(theirs, plain, derived).get_parameter(WEIGHT).abs().max() == 0


def test_the_scale_is_embedded_as_in_stock_pipelines(made) -> None:
    teacher, *_ = made
    stock = teacher.pipeline(unet=None, vae=None).get_guidance_scale_embedding
    scales = torch.tensor([1.0, 1.5, 7.25])
    assert torch.allclose(guidance_embedding(scales), stock(scales - 1, embedding_dim=256), atol=1e-3)


def test_loss_is_the_formula_in_plain_words(made, tmp_path) -> None:
    teacher, latents, derived = made
    student, plain = (inherit(teacher.unet, derived) for _ in range(2))
    for net in (student, plain):
        torch.nn.init.normal_(net.get_parameter(WEIGHT), generator=torch.Generator().manual_seed(1))
    distil(teacher, student, derived.pairs(), latents, STAGE, tmp_path, seed=5, runtime=CPU)
    samples = Samples(latents, STAGE, 5, teacher.process)
    clean, noise, t, condition = batch_of(samples, ("latents", "noise", "timestep"))
    scale = condition.pop("guidance_scale")
    assert scale.min() >= 1 and scale.max() <= 8 and len(set(scale.tolist())) == 4
    noisy = teacher.noise_scheduler.add_noise(clean, noise, t)
    nothing = {**condition, **{k: v.expand_as(condition[k]) for k, v in latents.unconditional.items()}}
    unguided = call_unet(teacher.unet, noisy, t, nothing)
    target = unguided + scale[:, None, None, None] * (call_unet(teacher.unet, noisy, t, condition) - unguided)
    embedded = teacher.pipeline(unet=None, vae=None).get_guidance_scale_embedding(scale - 1, embedding_dim=256)
    ours = call_unet(plain, noisy, t, condition, timestep_cond=embedded)
    assert first_row(tmp_path)["output"] == pytest.approx(torch.nn.functional.mse_loss(ours, target).item(), rel=1e-4)
    teacher.release("unet")


@pytest.mark.parametrize("made", ["sdxl"], indirect=True)
def test_killed_and_resumed_ends_in_the_same_student(made, tmp_path) -> None:
    teacher, latents, derived = made
    stage = STAGE.model_copy(update={"ema_decay": 0.9})
    students = [inherit(teacher.unet, derived) for _ in range(3)]

    def train(number: int, name: str):
        how = {"runtime": CPU, "saving": Saving(1)}
        return distil(teacher, students[number], derived.pairs(), latents, stage, tmp_path / name, **how)

    whole = train(0, "whole")
    with dies_after_checkpoint(1):
        train(1, "parts")
    assert state_hash(train(2, "parts")) == state_hash(whole)
    assert whole.get_parameter(WEIGHT).abs().max() > 0
    teacher.release("unet")


def test_stock_diffusers_draws_any_scale_with_one_call_a_step(made, tmp_path) -> None:
    teacher, _, derived = made
    student = inherit(teacher.unet, derived)
    torch.nn.init.normal_(student.get_parameter(WEIGHT), generator=torch.Generator().manual_seed(1))
    stock = DiffusionPipeline.from_pretrained(export(teacher, student, tmp_path, drawing=STAGE.made_for(Drawing())))
    stock.set_progress_bar_config(disable=True)
    calls = []
    stock.unet.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    given = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}

    def drawn(scale: float):
        return stock("a cat", guidance_scale=scale, generator=torch.Generator().manual_seed(0), **given).images

    pictures = [drawn(scale) for scale in (1, 2, 8)]
    assert calls == [1] * 6
    assert all((pictures[0] - other).abs().max() > 1e-3 for other in pictures[1:])


@pytest.mark.processes
def test_other_runtimes_draw_by_its_scale(made, tmp_path) -> None:
    teacher, _, derived = made
    student, stock = inherit(teacher.unet, derived), tmp_path / "stock"
    torch.nn.init.normal_(student.get_parameter(WEIGHT), generator=torch.Generator().manual_seed(1))
    how = EmbeddedGuidance(steps=2, guidance_scale=3, guidance_range=(1, 8), sampler="ddim")
    export(teacher, student, stock, drawing=how)
    facts = export_openvino(stock, tmp_path / "int8", ["a cat"], how, bits="int8", card={"teacher": "sd"})
    export_onnx(stock, tmp_path / "onnx", ["a cat"], how, card={"teacher": "sd"})
    export_openvino(stock, tmp_path / "openvino", ["a cat"], how, card={"teacher": "sd"})
    assert facts["psnr"] > 25
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32))
    pipe = DiffusionPipeline.from_pretrained(stock)
    [theirs] = pipe("a cat", num_inference_steps=2, guidance_scale=3, latents=noise, height=16, width=16).images
    assert levels_apart(drawn_by_the_example(tmp_path / "onnx", "a cat", 0), theirs) <= NEAR
    for ours in (OnnxPipeline(tmp_path / "onnx"), OpenVinoPipeline(tmp_path / "openvino", "f32")):
        pictures = []
        for scale in (3, 8):
            asked = Drawing(guidance_scale=scale)
            [theirs] = generate(stock, "a cat", drawing=asked, seed=4)
            pictures += ours.draw(["a cat"], [4], ours.drawing_of(asked))
            assert levels_apart(pictures[-1], theirs) <= NEAR
        assert levels_apart(*pictures) > 5 * NEAR
        with pytest.raises(UserError, match="guidance_scale 12: the model learned 1 to 8"):
            ours.drawing_of(Drawing(guidance_scale=12))
    with pytest.raises(UserError, match=r"--coreml: the U-Net of .* takes the guidance scale as an input"):
        export_coreml(stock, tmp_path / "coreml", ["a cat"], how)


@pytest.fixture(scope="module")
def finished(sd, pictures, tmp_path_factory) -> Path:
    """A run: plain distillation, then guidance at scales from 1 to 8, with a high learning rate."""
    folder = tmp_path_factory.mktemp("guided")
    values = {
        "teacher": str(sd),
        "plan": "bk-small",
        "data": {"source": str(pictures), "limit": 4},
        "stages": [
            {"steps": 1, "batch_size": 2, "warmup_steps": 0},
            {**STAGE.settings("plan", "teacher"), "learning_rate": 0.1},
        ],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 2, "guidance_scale": 3, "image_to_image": 1},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return run(load_recipe(folder / "recipe.yaml"), replace(CPU))


def test_everything_draws_by_its_scale_in_one_call(finished, monkeypatch, tmp_path) -> None:
    how = EmbeddedGuidance(steps=2, guidance_scale=3, guidance_range=(1, 8))
    model = Teacher(finished / "pipeline", only_draw=True)
    assert made_for(model) == how
    rows, forward = [], UNet2DConditionModel.forward
    monkeypatch.setattr(
        UNet2DConditionModel,
        "forward",
        lambda self, x, *args, **more: rows.append(len(x)) or forward(self, x, *args, **more),
    )
    default, three, five = (
        generate(finished, "a cat", drawing=given)[0].tobytes()
        for given in (None, Drawing(guidance_scale=3), Drawing(guidance_scale=5))
    )
    assert default == three != five
    assert rows == [1] * 6
    with pytest.raises(UserError, match="guidance_scale 12: the model learned 1 to 8"):
        generate(finished, "a cat", drawing=Drawing(guidance_scale=12))
    assert drawings([str(finished)]) == {"run": how} and how.rows == 1
    teacher, student = open_players([str(finished)], device="cpu", dtype=torch.float32)
    for scale, nearest in ((5, 5), (12, 8)):
        asked = Asked("a cat", 0, 16, Drawing(steps=2, guidance_scale=scale))
        assert student.draw(asked).drawing == how.model_copy(update={"guidance_scale": nearest})
    assert student.draw(asked).picture.tobytes() != student.draw(replace(asked, seed=1)).picture.tobytes()
    assert teacher.draw(asked).drawing == asked.drawing
    result = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    assert result["drawn"]["guidance_range"] == [1, 8]
    text = (finished / "evaluation" / "evaluation.md").read_text()
    assert "| samples through the U-Net for a picture | 4 | 2 | 50 % |" in text
    card = (finished / "pipeline" / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=3" in card
    assert "guidance_scale` from 1 to 8" in card


# -- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": [{"guidance_scale": [8, 1]}]}, r"stages.0.guidance_scale: a range is two rising numbers from 1 on"),
        ({"stages": [{"lora": 4}]}, "without 'lora', which has no place for the new layer"),
        ({"stages": [{"paths": 4}]}, "without 'paths', which are drawn at one scale"),
        (
            {"stages": [{}, {"guidance_scale": 3}]},
            "stages.0 has a range of 'guidance_scale'.* later stages need a range",
        ),
        ({"evaluation": {"prompts": ["a"], "guidance_scale": 9}}, "guidance_scale 9: the model learned 1 to 8"),
        ({"export": {"single_file": True}}, "'export.single_file': the layout has no name"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(change, said, tmp_path) -> None:
    values = {"teacher": "a/b", "plan": "bk-small", "data": {"source": "x"}, "output": "y"}
    values |= {"stages": [{}], "evaluation": {"prompts": ["a"]}} | change
    values["stages"] = [STAGE.settings("plan", "teacher") | stage for stage in values["stages"]]
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said):
        load_recipe(tmp_path / "recipe.yaml")


def test_it_is_no_teacher_and_other_forms_are_refused(finished, sd, pictures, tmp_path) -> None:
    pipeline, one_line = (
        finished / "pipeline",
        "takes the guidance scale as an input; prunet can draw with it and measure",
    )
    values = json.loads((finished.parent / "recipe.yaml").read_text())
    for stages in ([], [{"steps": 1, "teacher": str(pipeline)}]):
        recipe = {**values, "teacher": str(sd if stages else pipeline), "stages": stages or [{"steps": 1}]}
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output": str(tmp_path / "run")}))
        with pytest.raises(UserError, match=one_line):
            run(load_recipe(tmp_path / "recipe.yaml"), CPU)
    with pytest.raises(UserError, match=one_line):
        Personal(
            Personalization(model=str(pipeline), pictures=str(pictures), prompt="a cat", output=str(tmp_path / "p"))
        )
    with pytest.raises(UserError, match=one_line):
        export_single_file(pipeline, tmp_path / "student.safetensors")
    folder = shutil.copytree(pipeline, tmp_path / "lcm")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "_made_for"}))
    with pytest.raises(UserError, match="does not say which scales it learned"):
        generate(folder, "a cat")
    answers = json.loads((finished / "plan.json").read_text())
    assert answers["loads_in"]["diffusers, single file"].startswith("no: the layout has no name")
    assert answers["works_with"]["a ControlNet of its own"].startswith("no: ")
    assert answers["parameters"]["student"] == sum(
        p.numel() for p in Teacher(pipeline, only_draw=True).unet.parameters()
    )
