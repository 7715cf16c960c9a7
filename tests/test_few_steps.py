"""Few steps without guidance: losses, paths and samplers against plain formulas and stock diffusers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dies_after_checkpoint
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from prunet import Runtime, Teacher, UserError, build, derive, distil, export, generate, load_plan, load_recipe, run
from prunet.data import paths as paths_file
from prunet.data.encoding import cache
from prunet.data.paths import cache_paths
from prunet.evaluation import measuring
from prunet.evaluation.measures import markdown
from prunet.evaluation.protocol import Protocol
from prunet.evaluation.results import read_evaluation
from prunet.intervals import Measure
from prunet.plan.plan import Plan
from prunet.recipe.recipe import Data
from prunet.recipe.stage import Losses, Stage
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import made_for
from prunet.sampling.paths import check_jumps, schedule_of
from prunet.sampling.start import StartPicture
from prunet.speed.models import drawings
from prunet.student.student import state_hash
from prunet.training.checkpoints import Saving
from prunet.training.loop import _objective
from prunet.training.lora import check_rank
from prunet.training.samples import PathSamples, Samples

CPU = Runtime(device="cpu", precision="no", log_every=1)
PACE = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": None}
TRAJECTORY = Stage(objective="trajectory", guidance_scale=2.0, jumps=2, path_steps=4, paths=10, **PACE)
GUIDANCE = Stage(objective="guidance", guidance_scale=3.0, losses=Losses(task=0), caption_dropout=0, **PACE)
SCALE = 2.0


@pytest.fixture(scope="module", params=["sd", "sd_v", "sdxl"])
def made(request, pictures, tmp_path_factory):
    """A teacher, its latents and its paths; epsilon, v, and SDXL's layout."""
    teacher = Teacher(request.getfixturevalue(request.param))
    folder = tmp_path_factory.mktemp("caches")
    latents = cache(teacher, Data(source=str(pictures)), folder / "latents", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths_file, "BLOCK", 4)
        return teacher, latents, cache_paths(teacher, latents, TRAJECTORY, folder / "paths")


def small(teacher):
    plan = load_plan("bk-small" if teacher.kind == "sd" else "ssd-1b")
    return build(teacher, plan), derive(teacher.unet_config, plan).pairs()


def first_row(folder: Path) -> dict:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])


def batch_of(samples: Samples, names: tuple[str, ...]) -> tuple:
    items = [samples[0, place] for place in range(4)]
    stacked = [torch.stack([item[name] for item in items]) for name in names]
    conditions = [item["condition"] for item in items]
    return *stacked, {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}


def call_unet(net, noisy, t, condition):
    extra = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if "pooled" in condition else None
    return net(noisy, t, condition["prompt_embeds"], added_cond_kwargs=extra).sample


# -- paths


def test_paths_are_what_a_stock_pipeline_goes_through(made) -> None:
    teacher, _, paths = made
    stock = DiffusionPipeline.from_pretrained(teacher.source)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    stock.set_progress_bar_config(disable=True)
    assert len(paths) == 10
    seen = []
    for index in (0, 9):
        path, condition = paths.path(index)
        assert path.shape == (5, 4, 8, 8)
        embeds = {"prompt_embeds": condition["prompt_embeds"][None]}
        if teacher.kind == "sdxl":
            empty = {k: torch.zeros_like(v)[None] for k, v in condition.items()}
            embeds |= {
                "pooled_prompt_embeds": condition["pooled"][None],
                "negative_prompt_embeds": empty["prompt_embeds"],
            }
            embeds |= {"negative_pooled_prompt_embeds": empty["pooled"]}
        else:
            embeds |= {"negative_prompt_embeds": stock.encode_prompt("", "cpu", 1, False)[0]}
        way = [path[0]]

        def keep(pipe, step, t, values, way=way):
            way.append(values["latents"][0])
            return {}

        given = {"guidance_scale": SCALE, "num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16}
        stock(**embeds, latents=path[0][None].clone(), callback_on_step_end=keep, **given)
        torch.testing.assert_close(path, torch.stack(way), rtol=5e-3, atol=5e-3)
        seen.append(path[0])
    assert not torch.equal(*seen)


def test_each_caption_comes_once_before_one_comes_again(made) -> None:
    _, latents, _ = made
    chosen = [paths_file._caption_of(latents, number) for number in range(2 * len(latents))]
    assert sorted(chosen[: len(latents)]) == sorted(chosen[len(latents) :]) == list(range(len(latents)))


def test_killed_and_resumed_paths_are_the_same_bytes_and_others_are_refused(
    sd, pictures, tmp_path, monkeypatch
) -> None:
    teacher = Teacher(sd)
    latents = cache(teacher, Data(source=str(pictures)), tmp_path / "latents", seed=1)
    monkeypatch.setattr(paths_file, "BLOCK", 4)
    cache_paths(teacher, latents, TRAJECTORY, tmp_path / "whole")
    write = paths_file.write_block

    def dies(path, *rest):
        if path.name == "shard-00001.safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(paths_file, "write_block", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_paths(teacher, latents, TRAJECTORY, tmp_path / "parts")
    monkeypatch.setattr(paths_file, "write_block", write)
    cache_paths(teacher, latents, TRAJECTORY, tmp_path / "parts")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    for key, value in (("guidance_scale", 3.0), ("path_steps", 8), ("paths", 9)):
        other = TRAJECTORY.model_copy(update={key: value})
        with pytest.raises(UserError, match=r"paths of another (guidance_scale|steps|count): delete it"):
            cache_paths(teacher, latents, other, tmp_path / "parts")


# -- losses


def test_jump_loss_is_the_formula_in_plain_words(made, tmp_path) -> None:
    teacher, _, paths = made
    (student, pairs), (plain, _) = small(teacher), small(teacher)
    distil(teacher, student, pairs, paths, TRAJECTORY, tmp_path, seed=5, runtime=CPU)
    samples = PathSamples(paths, TRAJECTORY, 5, teacher.process)
    noisy, landed, t, after, condition = batch_of(samples, ("noisy", "landed", "timestep", "after"))
    assert set(t.tolist()) == {999, 499}
    kept = torch.cat([teacher.noise_scheduler.alphas_cumprod, torch.ones(1)])  # timestep -1 has no noise
    alpha, sigma, alpha_after, sigma_after = (
        x.view(-1, 1, 1, 1).sqrt() for x in (kept[t], 1 - kept[t], kept[after], 1 - kept[after])
    )
    out = call_unet(plain, noisy, t, condition)
    if teacher.process.prediction_type == "epsilon":
        clean = (noisy - sigma * out) / alpha
    else:
        clean = alpha * noisy - sigma * out
    noise = (noisy - alpha * clean) / sigma
    there = alpha_after * clean + sigma_after * noise  # where the step of DDIM lands
    slope = alpha_after - sigma_after * alpha / sigma
    weight = (alpha / sigma).square().clamp(min=1)
    loss = (weight * ((there - landed) / slope).square()).mean()
    assert first_row(tmp_path)["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_guidance_loss_is_the_formula_in_plain_words(made, tmp_path) -> None:
    teacher, latents, _ = made
    (student, pairs), (plain, _) = small(teacher), small(teacher)
    kept = {}
    distil(teacher, student, pairs, latents, GUIDANCE, tmp_path, seed=5, runtime=CPU)
    clean, noise, t, condition = batch_of(
        Samples(latents, GUIDANCE, 5, teacher.process), ("latents", "noise", "timestep")
    )
    noisy = teacher.noise_scheduler.add_noise(clean, noise, t)
    nothing = {**condition, **{k: v.expand_as(condition[k]) for k, v in latents.unconditional.items()}}
    unguided = call_unet(teacher.unet, noisy, t, nothing)
    pair = pairs[0]
    for net, name in ((teacher.unet, pair.teacher), (plain, pair.student)):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, net=net: kept.update({net: out[0] if isinstance(out, tuple) else out})
        )
    target = unguided + 3.0 * (call_unet(teacher.unet, noisy, t, condition) - unguided)
    row, mse = first_row(tmp_path), torch.nn.functional.mse_loss
    assert row["output"] == pytest.approx(mse(call_unet(plain, noisy, t, condition), target).item(), rel=1e-4)
    assert row[f"feature/{pair.teacher}"] == pytest.approx(mse(kept[plain], kept[teacher.unet]).item(), rel=1e-4)
    assert row["loss"] == pytest.approx(row["output"] + row["feature"], rel=1e-5)
    teacher.release("unet")


def test_on_paths_the_denoisers_see_the_points_of_the_paths(made) -> None:
    teacher, _, paths = made
    stage = Stage(guidance_scale=SCALE, paths=10, path_steps=4, losses=Losses(task=0), caption_dropout=0, **PACE)
    assert not {"guidance_scale", "paths"} & Stage(**PACE).settings().keys()  # so that older stages stay the same
    objective, samples = _objective(teacher, *small(teacher), paths, stage, 5)
    latents, noise, t, _ = batch_of(samples, ("latents", "noise", "timestep"))
    seen = objective._process.add_noise(latents, noise, t)
    for place, noisy in enumerate(seen):
        path, condition = paths.path(samples._choose(0, place))
        times = DPMSolverMultistepScheduler.from_config(schedule_of(teacher))
        times.set_timesteps(4)
        point = times.timesteps.tolist().index(t[place])
        torch.testing.assert_close(noisy, path[point], rtol=1e-4, atol=1e-4)
        assert torch.equal(samples[0, place]["condition"]["prompt_embeds"], condition["prompt_embeds"])
    assert len(set(t.tolist())) > 1


@pytest.mark.parametrize("made", ["sdxl"], indirect=True)
def test_killed_and_resumed_ends_in_the_same_student(made, tmp_path) -> None:
    teacher, _, paths = made
    stage = TRAJECTORY.model_copy(update={"ema_decay": 0.9})
    students = [small(teacher)[0] for _ in range(3)]
    before = state_hash(students[0])
    teacher.release("unet")

    def train(number: int, name: str):
        how = {"runtime": CPU, "saving": Saving(1)}
        return distil(teacher, students[number], (), paths, stage, tmp_path / name, **how)

    whole = train(0, "whole")
    with dies_after_checkpoint(1):
        train(1, "parts")
    assert state_hash(train(2, "parts")) == state_hash(whole) != before
    assert ("unet" in vars(teacher)) == bool(stage.teacher_calls)
    teacher.release("unet")


# -- what is exported


def test_stock_pipeline_draws_the_students_own_jumps(made, tmp_path) -> None:
    teacher, _, _ = made
    student, _ = small(teacher)
    folder = export(teacher, student, tmp_path / "out", drawing=TRAJECTORY.made_for(Drawing()))
    stock, process = DiffusionPipeline.from_pretrained(folder), teacher.process
    stock.set_progress_bar_config(disable=True)
    assert isinstance(stock.scheduler, DDIMScheduler)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = {"guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    drawn = stock("a cat", num_inference_steps=2, latents=noise.clone(), **given).images
    size = teacher.size_condition([(16, 16, 0, 0, 16, 16)])
    condition, x = {**teacher.encode_prompts(["a cat"]), **size}, noise
    with torch.no_grad():
        for t, after in ((999, 499), (499, -1)):
            t, after = torch.tensor([t]), torch.tensor([after])
            clean = process.clean(x, call_unet(student, x, t, condition), t)
            (a, s), (a2, s2) = process.signal_and_noise(t), process.signal_and_noise(after)
            x = a2 * clean + s2 * (x - a * clean) / s
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.clean_between(noise, x, torch.tensor([999]), torch.tensor([-1])), x)


@pytest.fixture(scope="module")
def finished_fast(sd, pictures, tmp_path_factory) -> Path:
    """A run: its first stage removes blocks and guidance at once, its second trains a LoRA to jump, on equal paths."""
    folder = tmp_path_factory.mktemp("fast")
    pace = {"steps": 1, "batch_size": 2, "warmup_steps": 0, "guidance_scale": 3, "path_steps": 4, "paths": 4}
    values = {
        "teacher": str(sd),
        "plan": "bk-small",
        "data": {"source": str(pictures), "limit": 4},
        "stages": [
            {"objective": "guidance", "losses": {"task": 0}, **pace},
            {"objective": "trajectory", "jumps": 2, "lora": 2, **pace, "learning_rate": 1e-2},
        ],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 4, "guidance_scale": 3},
        "export": {"single_file": True},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return run(load_recipe(folder / "recipe.yaml"), dataclasses.replace(CPU))


def test_it_is_drawn_correctly_by_default(finished_fast, sd) -> None:
    how = Drawing(steps=2, guidance_scale=1, sampler="ddim-trailing")
    for model in (finished_fast / "pipeline", finished_fast / "student.safetensors"):
        assert made_for(Teacher(model)) == how
    assert made_for(Teacher(sd)) is None
    assert [p.tobytes() for p in generate(finished_fast, "a cat")] == [
        p.tobytes() for p in generate(finished_fast / "pipeline", "a cat", drawing=how)
    ]
    assert drawings([str(sd), str(finished_fast)]) == {"sd": Drawing(), "run": how}
    card = (finished_fast / "pipeline" / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1" in card
    assert "`sgm_uniform`, 2 steps, cfg 1" in card
    assert "trajectory, 2 jumps, guidance 3" in card
    assert {folder.name for folder in finished_fast.glob("cache*")} == {"cache", "cache-paths"}


def test_its_lora_makes_the_student_of_the_stage_before_jump(finished_fast) -> None:
    stock = DiffusionPipeline.from_pretrained(finished_fast / "pipeline")
    jumps = stock.unet
    assert not any("lora" in name for name, _ in jumps.named_modules())
    stock.unet = UNet2DConditionModel.from_pretrained(finished_fast / "stage-1/unet")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([499]), torch.randn(1, 77, jumps.config.cross_attention_dim)
    with torch.no_grad():
        before, wanted = stock.unet(*inputs).sample, jumps(*inputs).sample
        stock.load_lora_weights(finished_fast / "stage-2")
        torch.testing.assert_close(stock.unet(*inputs).sample, wanted, rtol=1e-4, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-3


def test_image_to_image_starts_at_one_of_its_own_timesteps(finished_fast, capsys) -> None:
    """Of its two steps one is taken; a strength that leaves none is refused, and a rounded one is reported."""
    seen, noisy = [], UNet2DConditionModel.forward

    def look(self: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((int(timestep), len(sample)))
        return noisy(self, sample, timestep, *args, **kwargs)

    picture = Image.new("RGB", (16, 16), "red")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", look)
        generate(finished_fast, "a cat", start=StartPicture(picture, 0.7))
    assert seen == [(499, 1)]  # the second of its two jumps, without guidance
    assert "strength 0.7 of 2 steps: 1 drawn, as with 0.5" in capsys.readouterr().err
    result = read_evaluation(finished_fast / "evaluation").image_to_image
    assert result.strength == 0.5  # so the teacher begins there as well, with two of its four steps
    with pytest.raises(UserError, match=r"strength 0.4: of 2 steps that is not one: give 0.5 or more"):
        generate(finished_fast, "a cat", start=StartPicture(picture, 0.4))


def test_a_protocol_uses_the_students_own_settings_and_records_them(finished_fast, sd, tmp_path, monkeypatch) -> None:
    clip = {"model": "tiny", "source": "this test"}
    given = {
        "prompts": {"source": "this test"},
        "metrics": ["retrieval"],
        "clip": clip,
        "steps": 4,
        "guidance_scale": 3,
    }
    monkeypatch.setattr(measuring, "load_networks", lambda *_: {})
    monkeypatch.setattr(measuring, "compute", lambda *_: {"retrieval": Measure(0.5, 0.4, 0.6)})
    results = []
    for name, model in (("teacher", sd), ("student", finished_fast)):
        protocol = Protocol.model_validate({"name": "tiny", **given})
        results.append(measuring.measure(model, protocol, ["a", "b"], tmp_path / name))
        spec = json.loads((tmp_path / name / "pictures" / "spec.json").read_text())
        assert (spec["steps"], spec["guidance_scale"]) == ((4, 3) if name == "teacher" else (2, 1))
    measuring.measure(finished_fast, protocol, ["a", "b"], tmp_path / "asked", drawing=Drawing(steps=1))
    table = markdown(measuring.compare([tmp_path / name for name in ("teacher", "student", "asked")]))
    assert "| run (ddim-trailing, 2 steps, no guidance) | 0.5" in table
    assert "| run (ddim-trailing, 1 step, no guidance) | 0.5" in table
    assert "| sd | 0.5" in table


def test_evaluation_draws_the_teacher_by_the_recipe_and_the_student_by_what_it_was_made_for(finished_fast) -> None:
    result = json.loads((finished_fast / "evaluation" / "evaluation.json").read_text())
    assert result["drawn"] == {"steps": 2, "guidance_scale": 1.0, "sampler": "ddim-trailing"}
    assert (result["protocol"]["steps"], result["protocol"]["sampler"]) == (4, "dpmsolver++")
    text = (finished_fast / "evaluation" / "evaluation.md").read_text()
    assert "| samples through the U-Net for a picture | 8 | 2 | 25 % |" in text
    assert "The student draws as it was made for: ddim-trailing, 2 steps, no guidance." in text


# -- refusals


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"objective": "trajectory", "guidance_scale": 2, "jumps": 5}, "'jumps' 5 must divide 'path_steps' 12"),
        ({"objective": "trajectory", "guidance_scale": 2}, "objective trajectory needs 'jumps'"),
        ({"objective": "trajectory", "jumps": 2}, "objective trajectory needs 'guidance_scale'"),
        (
            {"objective": "trajectory", "guidance_scale": 2, "jumps": 2, "losses": {"task": 0}},
            "'losses' has no meaning",
        ),
        ({"objective": "guidance", "losses": {"task": 0}}, "objective guidance needs 'guidance_scale'"),
        ({"objective": "guidance", "guidance_scale": 2}, "needs 'losses.task' 0"),
        ({"objective": "guidance", "guidance_scale": 2, "jumps": 2}, "'jumps' has no meaning with objective guidance"),
        ({"jumps": 2}, "'jumps' has no meaning with objective distillation: leave it out"),
        ({"path_steps": 9}, "'path_steps' has no meaning with objective distillation: leave it out"),
        ({"paths": 9, "guidance_scale": 2}, "'paths' need 'losses.task' 0"),
        ({"paths": 9, "losses": {"task": 0}}, "objective distillation needs 'guidance_scale'"),
        (
            {"objective": "trajectory", "guidance_scale": 0, "jumps": 2},
            "'guidance_scale' 0 moves .* away from the prompt",
        ),
        ({"objective": "guidance", "guidance_scale": 0.5, "losses": {"task": 0}}, "'guidance_scale' 0.5 moves"),
        ({"objective": "adversarial"}, "stages.0.objective"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stage, said, tmp_path) -> None:
    values = {"teacher": "a/b", "plan": "bk-small", "data": {"source": "x"}, "output": "y"}
    values |= {"stages": [{"steps": 1, **stage}], "evaluation": {"prompts": ["a"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        load_recipe(tmp_path / "recipe.yaml")


def test_jumps_that_the_noise_schedule_cannot_make_are_refused(sd, sd_v, tmp_path) -> None:
    stage = TRAJECTORY.model_copy(update={"jumps": 3, "path_steps": 12})
    with pytest.raises(UserError, match=r"stages.1.jumps: 3 do not divide the 1000 timesteps"):
        check_jumps(Teacher(sd), stage, "stages.1")
    stage = TRAJECTORY.model_copy(update={"path_steps": 122})  # np.arange(1000, 0, -1000 / 122) has 123 numbers
    with pytest.raises(UserError, match=r"stages.1.path_steps: of 122, dpmsolver\+\+ makes 123"):
        check_jumps(Teacher(sd), stage, "stages.1")
    for source, fits in ((sd, False), (sd_v, True)):
        folder = tmp_path / source.name
        folder.mkdir()
        for part in source.iterdir():
            (folder / part.name).symlink_to(part)
        (folder / "scheduler").unlink()
        config = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
        (folder / "scheduler").mkdir()
        config["rescale_betas_zero_snr"] = True
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        if fits:
            check_jumps(Teacher(folder), TRAJECTORY, "stages.0")
        else:
            with pytest.raises(UserError, match=r"\(zero terminal SNR\): objective trajectory needs"):
                check_jumps(Teacher(folder), TRAJECTORY, "stages.0")


def test_a_damaged_note_on_how_to_draw_is_one_line(finished_fast, tmp_path) -> None:
    folder = shutil.copytree(finished_fast / "pipeline", tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    for value, said in (
        ({"steps": 0}, "_made_for: steps"),
        ({"sampler": "best"}, "no sampler 'best'"),
        ([], "_made_for"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | {"_made_for": value}))
        with pytest.raises(UserError, match=said):
            made_for(Teacher(folder))


def test_a_lora_without_attentions_is_refused(sd) -> None:
    removed = ("{down,up}_blocks.*.attentions.*", "mid_block.attentions.0", "mid_block.resnets.1")
    config = derive(Teacher(sd).unet_config, Plan("none left", removed)).student_config
    with pytest.raises(UserError, match=r"^stages\.1\.lora: a LoRA changes attentions, and this denoiser has none:"):
        check_rank(config, 4, "stages.1.lora")
