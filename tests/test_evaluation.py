"""Distances that are 0 for the teacher itself, grow with the damage, and equal what is computed by hand."""

import json

import pytest
import torch
from PIL import Image

from prunet import Drawing, Plan, StartPicture, Teacher, build, evaluate, generate, load_plan
from prunet.disk.files import read_json
from prunet.evaluation import drawing
from prunet.evaluation.evaluation import LEVELS, denoiser_errors
from prunet.evaluation.results import EvaluationResult, markdown
from prunet.recipe.recipe import Evaluation, Stage
from prunet.runtime import Runtime
from prunet.sampling.pictures import picture_rmse
from prunet.speed.clock import time_denoisers
from prunet.teacher.known import layout_config
from prunet.training.fit import training_memory

SPEC = Evaluation(prompts=["a cat", "a dog", "a house"], steps=2, guidance_scale=3.0)


def test_the_teacher_is_at_distance_zero_from_itself(sd, tmp_path, caplog) -> None:
    teacher = Teacher(sd)
    same, cut = build(teacher, Plan("none")), build(teacher, load_plan("bk-small"))
    result = evaluate(teacher, {"same": same, "cut": cut}, SPEC, tmp_path, size=16, seed=3)
    assert not caplog.records  # such as diffusers' warning of a cast
    assert result.distance["same"].denoiser == 0
    assert result.distance["same"].picture_by_prompt == [0, 0, 0]
    assert result.distance["cut"].denoiser > 0.01
    assert result.distance["cut"].latent > 0
    for key, (low, high) in result.distance["cut"].intervals.items():
        assert low < getattr(result.distance["cut"], key) < high
    assert EvaluationResult.load(tmp_path / "evaluation.json") == result
    assert read_json(tmp_path / "evaluation.json") == json.loads(json.dumps(result.facts()))
    assert "| U-Net parameters (M) |" in (tmp_path / "evaluation.md").read_text()


def test_image_to_image_starts_from_the_teachers_pictures(sd, tmp_path) -> None:
    """Each is drawn with the next prompt and with noise of its own; 0, or too few steps, leaves this out."""
    teacher = Teacher(sd)
    nets = {"same": build(teacher, Plan("none")), "cut": build(teacher, load_plan("bk-small"))}
    result = evaluate(teacher, nets, SPEC.model_copy(update={"image_to_image": 2}), tmp_path / "two", size=16, seed=3)
    found = result.image_to_image
    assert (found.prompts, found.seed, found.strength) == (["a dog", "a house"], 6, 0.5)  # one of two steps
    assert found.distance["same"].by_picture == [0, 0] != found.distance["cut"].by_picture
    low, high = found.distance["cut"].interval
    assert low < found.distance["cut"].picture < high
    for name in ("teacher", "same", "cut"):
        assert result.pictures.keys() >= {f"image-to-image/{name}/{i:04d}.png" for i in range(2)}
    begin, end = (
        Image.open(tmp_path / "two" / kind / "teacher" / "0001.png") for kind in ("pictures", "image-to-image")
    )
    how, start = Drawing(steps=2, guidance_scale=3.0), StartPicture(begin, 0.6)
    assert generate(sd, "a house", drawing=how, start=start, seed=7)[0].tobytes() == end.tobytes()
    assert "| pictures from 2 pictures of the teacher's (image to image) | 0.0000" in markdown(result)
    for folder, changes in (("off", {"image_to_image": 0}), ("few", {"steps": 1})):
        spec = SPEC.model_copy(update=changes)
        without = evaluate(teacher, {"cut": nets["cut"]}, spec, tmp_path / folder, size=16, seed=3)
        assert without.image_to_image is None
        assert "image_to_image" not in read_json(tmp_path / folder / "evaluation.json")


def test_a_stopped_evaluation_does_not_draw_again_what_it_has(sd, tmp_path, monkeypatch) -> None:
    """Stopped at each batch, once with a damaged picture, it ends in the same files; another seed's are not used."""
    monkeypatch.setattr(drawing, "BATCH", 2)
    teacher, drawn, left = Teacher(sd), [], [0]
    students = {"cut": build(teacher, load_plan("bk-small"))}
    whole = evaluate(teacher, students, SPEC, tmp_path / "whole", size=16, seed=3)
    real = drawing.draw_latents

    def draw(pipe, prompts, seeds, how, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return real(pipe, prompts, seeds, how, **settings)

    monkeypatch.setattr(drawing, "draw_latents", draw)
    for seed in (4, 3, 3):
        left[0] = 1
        with pytest.raises(KeyboardInterrupt):
            evaluate(teacher, students, SPEC, tmp_path / "parts", size=16, seed=seed)
    kept = tmp_path / "parts" / "drawn" / "teacher" / "00000.safetensors"
    data = bytearray(kept.read_bytes())
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    left[0] = 9
    parts = evaluate(teacher, students, SPEC, tmp_path / "parts", size=16, seed=3)
    assert drawn == [
        [4, 5],
        [3, 4],
        [5],
        [3, 4],
        [3, 4],
        [5],
    ]  # the teacher first, then the damaged picture again, then the cut one
    assert parts.distance == whole.distance and parts.pictures == whole.pictures
    names = [sorted(str(p.relative_to(tmp_path / f)) for p in (tmp_path / f).rglob("*")) for f in ("parts", "whole")]
    assert names[0] == names[1]


def test_denoiser_distance_by_hand(sd) -> None:
    """A student whose output is twice the teacher's has an error equal to the teacher's power, which is 1."""
    teacher = Teacher(sd)
    twice = build(teacher, Plan("none"))
    for tensor in twice.conv_out.parameters():
        tensor.data.mul_(2)
    latents = torch.randn(5, 4, 8, 8)
    error, power = denoiser_errors(teacher, twice, ["a"] * 5, latents, seed=0)
    assert error.shape == (5, len(LEVELS))
    assert (error / power).flatten().tolist() == pytest.approx([1.0] * 5 * len(LEVELS), rel=1e-5)


def test_denoisers_get_other_noise_than_the_pictures_were_drawn_from(sd) -> None:
    """With equal noise the inputs lie near the teacher's own paths, where errors are smaller."""
    teacher, inputs = Teacher(sd), []
    drawn_from = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7 + i)) for i in range(4)])
    net = build(teacher, Plan("none"))
    hook = net.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    for _ in range(2):
        denoiser_errors(teacher, net, ["a"] * 4, torch.zeros(4, 4, 8, 8), seed=7)
    hook.remove()
    noisiest = inputs[len(LEVELS) - 1]
    assert torch.equal(noisiest, inputs[-1])  # the same for every student
    alike = torch.corrcoef(torch.cat([noisiest, drawn_from]).flatten(1))
    assert alike.fill_diagonal_(0).abs().max() < 0.3  # 256 numbers each: 0.06 by chance


def test_evaluation_does_not_depend_on_other_students(sdxl, tmp_path) -> None:
    teacher, spec = Teacher(sdxl), Evaluation(prompts=["a cat", "a dog"], steps=1, guidance_scale=3.0)
    cut = build(teacher, load_plan("vega"))
    alone = evaluate(teacher, {"cut": cut}, spec, tmp_path / "a", size=16, seed=3)
    other = build(teacher, load_plan("ssd-1b"))
    beside = evaluate(teacher, {"other": other, "cut": cut}, spec, tmp_path / "b", size=16, seed=3)
    assert alone.distance["cut"] == beside.distance["cut"]


def test_picture_rmse_by_hand() -> None:
    black, grey = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), (51, 0, 0))
    assert picture_rmse(black, black) == 0
    assert picture_rmse(black, grey) == pytest.approx((0.2**2 / 3) ** 0.5)


def test_measure_reports_every_model_with_its_precision(sdxl) -> None:
    teacher = Teacher(sdxl)
    small = build(teacher, load_plan("vega")).to(torch.bfloat16)
    result = time_denoisers({"teacher": teacher.unet, "student": small}, repeats=2)
    assert result.dtypes == {"teacher": "float32", "student": "bfloat16"}
    models = {"teacher": teacher.unet, "student": small}
    weights = {name: sum(p.nbytes for p in net.parameters()) / 2**20 for name, net in models.items()}
    for name, speed in result.speeds.items():
        assert speed.latency_ms > 0
        assert speed.peak_memory_mb is None or speed.peak_memory_mb >= weights[name]


def test_memory_estimate_counts_each_parameter_as_it_is_kept() -> None:
    """A teacher in half precision: 2 bytes; a student: weight, gradient, two moments, average, 4 bytes each."""
    config = layout_config("sd-v1")
    how = Stage(steps=1), Runtime(device="cpu", precision="bf16")
    memory = training_memory(config, config, (64, 64), 1, *how)
    count = 859_520_964
    assert memory["teacher"] == 2 * count
    assert memory["student"] + memory["gradients"] + memory["optimizer"] + memory["ema"] == 20 * count
    twice = training_memory(config, config, (64, 64), 2, *how)
    casts = 2 * count
    assert twice["activations"] - casts == 2 * (memory["activations"] - casts)
