"""Image to image and inpainting: what stock diffusers draws from the same picture, noise and strength."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image
from test_cli import call
from test_pipeline import STOCK

from prunet import Drawing, Teacher, UserError, build, export, generate, load_plan
from prunet.denoisers.freeze import freeze
from prunet.sampling.draw import draw_latents
from prunet.sampling.start import StartPicture, start_from

HALF = Image.new("L", (16, 16))
HALF.paste(255, (0, 0, 8, 16))  # white, which is drawn, on the left


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def change(a: Image.Image, b: Image.Image, columns: slice = slice(None)) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float))[:, columns].mean())


@pytest.fixture(scope="module")
def student(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = Teacher(sd)
    return export(teacher, build(teacher, load_plan("bk-tiny")), tmp_path_factory.mktemp("students") / "tiny")


def stock_latents(folder: Path, sampler: str, mask: Image.Image | None, strength: float, **how: Any) -> torch.Tensor:
    scheduler, options = STOCK[sampler]
    auto = AutoPipelineForImage2Image if mask is None else AutoPipelineForInpainting
    pipe = auto.from_pretrained(folder, scheduler=scheduler.from_pretrained(folder / "scheduler", **options))
    pipe.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder"):
        freeze(getattr(pipe, part))
    if mask is not None:
        how |= {"mask_image": [mask, mask], "height": 16, "width": 16}
    noise = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    given = {"image": [picture(1), picture(2)], "strength": strength, "generator": noise, "output_type": "latent"}
    return pipe(prompt=["a cat", "a dog"], **given, **how).images


#: Stock diffusers encodes the picture under the mask too, after it has drawn the noise: where the sampler draws more
#: noise at each step (euler-a, lcm), that of inpainting is another.
CASES = [("sd", None, sampler) for sampler in STOCK]
CASES += [("sd", HALF, sampler) for sampler in STOCK if sampler not in ("euler-a", "lcm")]
CASES += [(model, mask, "dpmsolver++") for model in ("sdxl", "student") for mask in (None, HALF)]


@pytest.mark.parametrize(("model", "mask", "sampler"), CASES)
def test_it_draws_what_stock_diffusers_draws(model: str, mask: Image.Image | None, sampler: str, request) -> None:
    folder = request.getfixturevalue(model)
    teacher = Teacher(folder)
    start = start_from(teacher, [picture(1), picture(2)], size=16, steps=5, strength=0.6, mask=mask)
    how = Drawing(steps=5, guidance_scale=2.0, sampler=sampler)
    ours = draw_latents(teacher.pipeline(), ["a cat", "a dog"], [4, 9], how, start=start)
    theirs = stock_latents(folder, sampler, mask, 0.6, num_inference_steps=5, guidance_scale=2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, HALF])
def test_pure_noise_is_where_strength_1_starts(sd: Path, mask: Image.Image | None) -> None:
    theirs = stock_latents(sd, "ddim", mask, 1.0, num_inference_steps=2, guidance_scale=1.0)
    teacher = Teacher(sd)
    start = start_from(teacher, [picture(1), picture(2)], size=16, steps=2, strength=1.0, mask=mask)
    how = Drawing(steps=2, guidance_scale=1.0, sampler="ddim")
    ours = draw_latents(teacher.pipeline(), ["a cat", "a dog"], [4, 9], how, start=start)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(sd: Path) -> None:
    together = generate(sd, "a cat", num_images=3, drawing=Drawing(steps=3), start=StartPicture(picture(1)), seed=5)
    alone = generate(sd, "a cat", drawing=Drawing(steps=3), start=StartPicture(picture(1)), seed=7)
    assert change(together[2], alone[0]) <= 1
    assert change(together[1], alone[0]) > 1


def test_black_parts_of_the_mask_stay(sd: Path) -> None:
    """Up to the VAE, which it passes through; at strength 1 without a mask nothing stays."""
    how = Drawing(steps=2)
    before = generate(sd, "a cat", drawing=how, start=StartPicture(picture(1), 0.5))[0]
    wide = Image.new("L", (16, 16))
    wide.paste(255, (0, 0, 4, 16))
    start = StartPicture(before, mask=wide)
    first, second = (generate(sd, "a dog", drawing=how, start=start, seed=seed)[0] for seed in (1, 2))
    assert change(first, second, slice(0, 4)) > 5 * change(first, second, slice(12, 16))


def test_a_wide_picture_is_cropped_in_the_middle(sd: Path) -> None:
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste(picture(1), (16, 0))
    drawn = [generate(sd, "a cat", drawing=Drawing(steps=2), start=StartPicture(p))[0] for p in (wide, picture(1))]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_a_wrong_start_picture_is_refused_before_anything_is_drawn(sd: Path) -> None:
    for given, message in (
        ({"strength": 0.0}, "strength 0: give a number above 0, up to 1"),
        ({"strength": 1.01}, "strength 1.01: give"),
        ({"strength": float("nan")}, "strength nan: give"),
        ({"strength": 0.3}, "of 3 steps that is not one: give 0.34 or more"),
        ({"mask": Image.new("L", (8, 16), "white")}, "has 8 x 16 px, its picture 16 x 16: give a mask of the pict"),
        ({"mask": Image.new("L", (16, 16))}, "mask: has no white"),
    ):
        with pytest.raises(UserError, match=message):
            generate(sd, "a cat", drawing=Drawing(steps=3), start=StartPicture(picture(1), **given))


def test_a_mask_with_transparent_parts_is_refused(sd, tmp_path, capsys) -> None:
    picture(1).save(tmp_path / "start.png")
    strokes = Image.new("RGBA", (16, 16), "white")
    for opaque in (True, False):
        strokes.putalpha(255 if opaque else Image.linear_gradient("L").resize((16, 16)))
        strokes.save(mask := tmp_path / f"{opaque}.png")
        given = ("--image", tmp_path / "start.png", "--mask", mask, "--steps", 1, "--device", "cpu")
        code, _, err = call(capsys, "generate", sd, "a cat", *given, "-o", tmp_path / f"{opaque}")
        assert code == (0 if opaque else 2) and ("has transparent parts" in err) == (not opaque), err


@pytest.mark.parametrize("option", ["--mask", "--strength"])
def test_a_mask_or_strength_without_a_picture_is_refused(option: str, capsys, sd: Path, tmp_path: Path) -> None:
    code, _, err = call(capsys, "generate", sd, "a cat", option, "0.5", "-o", tmp_path / "out")
    assert code == 2 and f"{option}: needs a picture to start from: add --image" in err


def test_the_verb_draws_what_the_function_draws(capsys, sd: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "in.png")
    HALF.save(tmp_path / "mask.png")
    flags = ("--steps", 2, "--device", "cpu", "--precision", "no", "--json", "-o", tmp_path / "out", "-n", 2)
    start = ("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--strength", 0.5)
    code, out, _ = call(capsys, "generate", sd, "a cat", *start, *flags)
    assert code == 0
    drawn = [Image.open(path).tobytes() for path in json.loads(out.splitlines()[-1])["pictures"]]
    ours = generate(sd, "a cat", num_images=2, drawing=Drawing(steps=2), start=StartPicture(picture(1), 0.5, HALF))
    assert drawn == [p.tobytes() for p in ours]


def test_mistakes_of_the_verb_are_one_line(capsys, sd: Path, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "in.png")
    Image.new("L", (32, 32), "white").save(tmp_path / "mask.png")
    Image.new("1", (10_000, 5_001)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    for given, message in (
        (("--image", "in.png", "--mask", "mask.png"), "has 32 x 32 px, its picture 16 x 16"),
        (("--image", "text.png"), "--image .*text.png: not a picture"),
        (("--image", "nowhere.png"), "--image .*nowhere.png: there is no such file"),
        (("--image", "large.png"), "more than 50,000,000 pixels"),
        (("--image", "in.png", "--mask", "text.png"), "--mask .*text.png: not a picture"),
        (("--image", "in.png", "--strength", 7), "strength 7: give a number above 0"),
        (("--mask", "mask.png"), "--mask: needs a picture to start from: add --image"),
        (("--image", "in.png", "-o", "in.png"), "is .*in.png, which prunet only reads"),
    ):
        args = [tmp_path / str(arg) if str(arg).endswith(".png") else arg for arg in given]
        out = () if "-o" in given else ("-o", tmp_path / "out")
        code, _, err = call(capsys, "generate", sd, "a cat", *args, *out, "--device", "cpu")
        assert (code, len(err.splitlines())) == (2, 1), err
        assert re.search(message, err), err
