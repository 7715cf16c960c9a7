"""What ships: the emoji data with its splits, the teachers trained on it, and the scorer that measures them."""

import itertools
import json
import runpy
import sys
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor

from prunet import Teacher, derive, load_plan, load_protocol, load_recipe
from prunet.data.sources import read_pictures
from prunet.evaluation.networks import Clip
from prunet.evaluation.protocol import protocol_prompts
from prunet.recipe.recipe import read_prompts

EMOJI = Path(__file__).parent.parent / "emoji"
STYLES = {"3d", "noto", "flat"}
TEACHERS = {"emoji-sd": ("bk-base", "bk-small", "bk-tiny"), "emoji-xl": ("ssd-1b", "vega", "koala-1b", "koala-700m")}
SHIPPED = [name for name in TEACHERS if (EMOJI / name).exists()]


@pytest.fixture
def scripts(monkeypatch) -> None:
    """emoji/*.py are scripts that import each other by name."""
    monkeypatch.syspath_prepend(str(EMOJI))
    yield
    for name in [name for name, module in sys.modules.items() if str(EMOJI) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def records(split: str) -> list[dict]:
    out = []
    for shard in sorted((EMOJI / "data").glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            out += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return out


@cache
def stock(name: str) -> DiffusionPipeline:
    """Opened once; tests only draw and encode with it."""
    pipe = DiffusionPipeline.from_pretrained(EMOJI / name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_held_out_labels_and_combinations_are_in_no_training_picture() -> None:
    train, combinations, labels = map(records, ("train", "heldout-combinations", "heldout-labels"))
    seen = {(r["label"], r["style"]) for r in train}
    assert not seen & {(r["label"], r["style"]) for r in combinations}
    assert not {r["label"] for r in train + combinations} & {r["label"] for r in labels}
    every = train + combinations + labels
    assert {r["style"] for r in every} == STYLES
    count = len({r["label"] for r in every})
    assert 0.04 < len({r["label"] for r in labels}) / count < 0.06
    assert 0.09 < len(combinations) / (len(train) + len(combinations)) < 0.12
    assert all(len(r["captions"]) >= 4 for r in every)


def test_known_labels_are_in_the_training_split_and_some_of_their_styles_are_held_out() -> None:
    known = set((EMOJI / "known-labels.txt").read_text().splitlines())
    assert known <= {r["label"] for r in records("train")}
    assert set((EMOJI / "first-labels.txt").read_text().splitlines()) <= known
    assert sum(r["label"] in known for r in records("heldout-combinations")) >= 100


def test_size_in_the_repository() -> None:
    assert sum(f.stat().st_size for f in (EMOJI / "data").glob("*.tar")) <= 25e6
    sizes = [
        sum(f.stat().st_size for f in (EMOJI / name).rglob("*") if f.is_file()) for name in (*TEACHERS, "emoji-clip")
    ]
    assert max(sizes) <= 60e6
    assert sum(sizes) <= 100e6


@pytest.mark.parametrize("name", SHIPPED)
def test_teacher_is_a_stock_pipeline_and_takes_the_plans_of_its_layout(name: str) -> None:
    pipe = stock(name)
    config = Teacher(EMOJI / name).unet_config
    assert (config["layers_per_block"], config["sample_size"]) == (2, 16)
    assert len(config["down_block_types"]) == (4 if name == "emoji-sd" else 3)
    for plan in TEACHERS[name]:
        derive(config, load_plan(plan))

    def draw(scale: float, **more) -> np.ndarray:
        rng = torch.Generator().manual_seed(0)
        return pipe(
            "red heart, 3d", num_inference_steps=2, guidance_scale=scale, generator=rng, output_type="np"
        ).images

    plain, guided = draw(1.0), draw(7.0)
    assert plain.shape == (1, 128, 128, 3)
    assert np.isfinite(plain).all() and np.isfinite(guided).all()
    assert np.abs(plain - guided).mean() > 0.01


@pytest.mark.parametrize("name", SHIPPED)
def test_image_to_image_keeps_the_shape_and_takes_the_colour(name: str) -> None:
    """From a grey disc with strength 0.75, `red heart` keeps the corners white and makes the middle red."""
    pipe = AutoPipelineForImage2Image.from_pipe(stock(name))
    pipe.set_progress_bar_config(disable=True)
    y, x = np.mgrid[:128, :128]
    disc = np.where(((x - 64) ** 2 + (y - 64) ** 2 < 48**2)[..., None], [140, 140, 140], [255, 255, 255])
    start = Image.fromarray(disc.astype(np.uint8))
    rng = torch.Generator().manual_seed(0)
    out = pipe("red heart, 3d", image=start, strength=0.75, num_inference_steps=8, guidance_scale=3.0, generator=rng)
    picture = np.array(out.images[0]).astype(float)
    assert picture[:8, :8].mean() > 220
    middle = picture[48:80, 48:80].mean((0, 1))
    assert middle[0] > middle[1] + 30 and middle[0] > middle[2] + 30


@pytest.mark.parametrize("name", SHIPPED)
def test_teacher_tells_a_red_heart_from_a_green_one(name: str) -> None:
    """Drawn in 6 steps: the middle of the picture has the colour that the prompt names."""
    pipe = stock(name)
    for colour, channel in (("red", 0), ("green", 1)):
        rng = torch.Generator().manual_seed(0)
        out = pipe(f"{colour} heart, 3d", num_inference_steps=6, guidance_scale=3.0, generator=rng, output_type="np")
        assert out.images[0, 48:80, 48:80].mean((0, 1)).argmax() == channel, colour


@pytest.mark.parametrize("name", SHIPPED)
def test_training_conditions_are_those_of_the_stock_pipeline(name: str, scripts, tmp_path) -> None:
    """The U-Net was trained on what a pipeline gives it, for a prompt and for the empty prompt of guidance."""
    import conditioning
    import export

    export.restore(EMOJI / name, tmp_path)
    ours = conditioning.encode_captions(tmp_path, ["owl, noto"])
    empty = conditioning.empty_condition(tmp_path)
    pipe = stock(name)
    with torch.no_grad():
        theirs = pipe.encode_prompt(
            "owl, noto", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    torch.testing.assert_close(ours["prompts"].float(), theirs[0].float(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(empty["prompts"].float(), theirs[1].float(), atol=2e-3, rtol=2e-3)
    if name == "emoji-xl":
        torch.testing.assert_close(ours["pooled"].float(), theirs[2].float(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(empty["pooled"].float(), theirs[3].float(), atol=2e-3, rtol=2e-3)


def test_a_part_that_was_half_restored_is_restored_again(scripts, tmp_path) -> None:
    import export

    export.restore(EMOJI / "emoji-sd", tmp_path / "whole")
    (tmp_path / "killed" / ".unet.part").mkdir(parents=True)  # as a kill leaves it
    (tmp_path / "killed" / ".unet.part" / "config.json").write_text("{}")
    export.restore(EMOJI / "emoji-sd", tmp_path / "killed")

    def contents(folder: Path) -> dict[Path, bytes]:
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("given", [["--minutes", "0"], ["--learning-rate", "nan"], ["--batch-size", "-1"]])
def test_training_refuses_budgets_that_train_nothing(given, scripts, tmp_path, monkeypatch, capsys) -> None:
    import train

    command = ["train.py", str(EMOJI / "emoji-sd.yaml"), "unet", *given, "--state", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2 and "above 0" in capsys.readouterr().err


def test_distillation_target_is_what_the_tutor_says_of_the_same_latents_and_captions(scripts) -> None:
    from conditioning import empty_condition, encode_captions
    from diffusers import DDPMScheduler
    from unet import draw_batch, noise_error, placed, tutored_noise

    root = EMOJI / "emoji-sd"
    prompts, empty = encode_captions(root, ["red apple, 3d", "dog face, noto"])["prompts"], empty_condition(root)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cache = {"latents": latents, "count": torch.ones(2).long(), "first": torch.arange(2), "prompts": prompts}
    cache["tutor_prompts"], empty["tutor_prompts"] = prompts, empty["prompts"]
    net = placed(UNet2DConditionModel.from_pretrained(root / "unet").requires_grad_(False), torch.device("cpu"))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def error(**target) -> torch.Tensor:
        dice = torch.Generator().manual_seed(1)
        return noise_error(net, scheduler, *draw_batch(cache, empty, 8, 0.5, dice), dice, **target)[0]

    # If a model is its own tutor, only the loss to the noise remains, for dropped captions and for kept ones.
    torch.testing.assert_close(error(target=tutored_noise(net, 0.75)), error() / 16, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_measures_are_of_the_weights_that_ship(name: str, scripts) -> None:
    import measure

    if not (EMOJI / name / "measures.json").is_file():
        pytest.skip("not measured yet, as its card says")
    found = json.loads((EMOJI / name / "measures.json").read_text())
    assert found["weights"] == measure.weights_hash(EMOJI / name)
    assert found["scorer"] == measure.weights_hash(EMOJI / "emoji-clip")
    assert min(found[row]["pictures"] for row in measure.ROWS) >= 1000


def test_autoencoder_keeps_held_out_pictures(scripts) -> None:
    from autoencoder import psnr_db
    from shards import read_split, stack_images

    assert psnr_db(stock("emoji-sd").vae, stack_images(read_split(EMOJI / "data", "heldout-labels")[:24])) > 30


def test_scorer_was_trained_on_what_its_preprocessor_gives(scripts) -> None:
    from scorer import resize
    from shards import read_split, stack_images

    samples = read_split(EMOJI / "data", "heldout-labels")[:8]
    processor = AutoImageProcessor.from_pretrained(EMOJI / "emoji-clip", local_files_only=True)
    pixels = processor([sample.picture for sample in samples], return_tensors="pt")["pixel_values"]
    ours = resize(stack_images(samples), pixels.shape[-1])
    assert pixels.std() > 0.3  # otherwise the tolerance would hide a difference
    torch.testing.assert_close(ours, pixels, atol=0.06, rtol=0)  # 8-bit pixels are 0.008 apart


def test_scorer_finds_captions_of_held_out_pictures_far_better_than_chance(scripts) -> None:
    from scorer import retrieval
    from shards import read_split

    published = json.loads((EMOJI / "emoji-clip/training.json").read_text())["retrieval"]["heldout-labels"]
    found = retrieval(Clip.load(EMOJI / "emoji-clip"), read_split(EMOJI / "data", "heldout-labels"))
    assert found["r_at_1"] == pytest.approx(published["r_at_1"], abs=0.01)
    assert found["r_at_1"] > 20 * found["chance"]


def test_kid_of_embeddings_is_the_mean_over_pairs_of_a_cubic_kernel(scripts) -> None:
    """Against the definition, pair by pair; near zero for two samples of one distribution."""
    from measure import embed

    from prunet.evaluation.metrics import squared_mmd

    draw = torch.randn(3, 200, 16, generator=torch.Generator().manual_seed(0))
    x, y, z = (embed(lambda rows: rows, values) for values in (draw[0], draw[1], draw[2].abs()))
    a, b = x[:7], y[:5]
    k = lambda p, q: (p @ q / np.linalg.norm(p) / np.linalg.norm(q) + 1) ** 3  # noqa: E731
    expected = np.mean([k(p, q) for p, q in itertools.permutations(a, 2)])
    expected += np.mean([k(p, q) for p, q in itertools.permutations(b, 2)])
    expected -= 2 * np.mean([k(p, q) for p in a for q in b])
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-5)
    assert abs(squared_mmd(x, y)) < 0.01 < squared_mmd(x, z)


def test_demo_evaluates_on_what_the_student_never_saw(monkeypatch) -> None:
    monkeypatch.chdir(EMOJI.parent)
    recipe = load_recipe("demo")
    shown = itertools.islice(read_pictures(recipe.data.source), recipe.data.limit)
    captions = {caption for picture in shown for caption in picture.captions}
    prompts = read_prompts(recipe.evaluation.prompts)
    assert len(prompts) == 12
    assert not captions & set(prompts)


@pytest.mark.parametrize(("name", "split"), [("emoji-train", "train"), ("emoji-heldout", "heldout-combinations")])
def test_protocols_fit_the_data_and_the_scorer_that_ship(scripts, name: str, split: str) -> None:
    from shards import read_split

    protocol, beside = load_protocol(EMOJI / "protocols" / f"{name}.yaml")
    known = set((EMOJI / "known-labels.txt").read_text().splitlines())
    samples = [sample for sample in read_split(EMOJI / "data", split) if sample.label in known]
    pairs = [f"{sample.label.lower()}, {sample.style}" for sample in samples]
    prompts = protocol_prompts(protocol, beside, None)
    assert len(prompts) >= 500 and prompts[: len(pairs)] == pairs and set(prompts) == set(pairs)
    scorer = Clip.load(beside / protocol.clip.file)
    with safe_open(beside / protocol.real.file, "pt") as file:
        assert json.loads(file.metadata()["prunet"])["network"] == scorer.hash
        features = file.get_tensor("features")
    pictures = [sample.picture for sample in samples[:8]]
    torch.testing.assert_close(features[:8], scorer(pictures)["image"], rtol=1e-3, atol=1e-3)
    assert len(features) == len(pairs)


def test_scripts_write_text_encoders_that_every_client_reads(scripts, sdxl, tmp_path) -> None:
    from export import save_pipeline

    save_pipeline(DiffusionPipeline.from_pretrained(sdxl), tmp_path)
    for part in ("text_encoder", "text_encoder_2"):
        with safe_open(tmp_path / part / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in names


@pytest.mark.parametrize("script", ["train", "measure", "unpack"])
def test_a_script_says_how_it_is_called(script: str, scripts, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EMOJI / f"{script}.py"), run_name="__main__")
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out
