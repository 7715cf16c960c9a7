"""Measuring: the same bytes however the work is divided; two protocols are never in one table."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import make_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from prunet import Drawing, Teacher, UserError, compare, measure
from prunet.disk.files import read_json
from prunet.disk.ownership import LOCK
from prunet.disk.seals import SEAL
from prunet.evaluation import extraction, metrics
from prunet.evaluation.measures import Measures, read_measures
from prunet.evaluation.networks import Clip
from prunet.evaluation.protocol import Protocol, ProtocolFiles, load_protocol, protocol_names, protocol_prompts
from prunet.recipe.prompts import prompts_hash, read_prompt_file
from prunet.sampling import shards
from prunet.sampling.shards import draw_shards, read_shard

SHARD = 30  # as in run_prunet.py
#: Three shards; PRUNET_TEST_PROMPTS=600 gives twenty.
COUNT = int(os.environ.get("PRUNET_TEST_PROMPTS", 70))
PROMPTS = [f"a {('red', 'blue', 'green')[thing % 3]} {thing // 3}" for thing in range(COUNT)]


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", SHARD)
        patch.setattr(extraction, "SHARD", SHARD)
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = make_tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**size, "vocab_size": len(tokenizer), "eos_token_id": len(tokenizer) - 1},
            vision_config={**size, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    processor = {"do_resize": True, "size": {"shortest_edge": 16}, "crop_size": side, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def protocol(clip: Path) -> Path:
    folder = clip.parent
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / "real" / f"{i:02d}.png")
    value = {
        "name": "tiny",
        "prompts": {"source": "this test", "file": "prompts.txt", "count": len(PROMPTS)},
        "steps": 2,
        "guidance_scale": 2.0,
        "resize": 12,
        "jpeg": 90,
        "metrics": ["clip_score", "retrieval", "kid", "fid", "precision", "recall"],
        "features": "clip",
        "kid_subset_size": 30,
        "clip": {"model": "tiny", "source": "this test", "file": "clip"},
        "real": {"source": "this test", "file": "real"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(value))
    return folder / "tiny.yaml"


def run(sd: Path, protocol: Path, folder: Path, *, subject: str | None = None, **options) -> Measures:
    chosen, beside = load_protocol(protocol)
    prompts = protocol_prompts(chosen, beside, None, subject=subject)
    return measure(sd, chosen, prompts, folder, files=ProtocolFiles(beside, **options))


@pytest.fixture(scope="module")
def whole(sd: Path, protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "whole"
    run(sd, protocol, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files except the mark and the lock, which contain times."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (SEAL, LOCK))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.processes
def test_two_processes_killed_once_give_the_same_bytes(sd: Path, protocol: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [
        str(Path(__file__).parent / "run_prunet.py"),
        "measure",
        str(sd),
        "--protocol",
        str(protocol),
        "-o",
        str(folder),
        "--device",
        "cpu",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(folder.glob("pictures/*.tar")):
        time.sleep(0.01)
    for process in (*psutil.Process(first.pid).children(recursive=True), first):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    first.wait()
    assert not (folder / "measures.json").exists()
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=240 + COUNT)
    assert contents(folder) == contents(whole)


def test_batch_size_changes_no_more_than_rounding(sd: Path, tmp_path: Path) -> None:
    pipe, how = Teacher(sd).pipeline(), Drawing(steps=2, guidance_scale=2.0)
    sets = []
    for batch_size in (1, 16):
        drawn = {"seed": 3, "size": 16, "batch_size": batch_size}
        paths = draw_shards(lambda: pipe, PROMPTS[:16], tmp_path / str(batch_size), how, **drawn)
        sets.append([np.asarray(picture, dtype=int) for path in paths for picture, _ in read_shard(path)])
    assert max(np.abs(a - b).max() for a, b in zip(*sets, strict=True)) <= 1
    assert np.abs(sets[0][0] - sets[0][1]).max() > 3  # while two pictures are not the same


def test_numbers_are_those_of_the_files(whole: Path, protocol: Path) -> None:
    result = read_measures(whole)
    parts = [load_file(path) for path in sorted((whole / "features").glob("clip-*/*"))]
    image, text = (torch.cat([part[name] for part in parts]).double() for name in ("image", "text"))
    cosine = torch.nn.functional.cosine_similarity(image, text).mean().item()
    assert result.measures["clip_score"].value == pytest.approx(cosine)
    assert len(image) == len(PROMPTS) == result.protocol["count"]
    real = load_file(whole / "real.safetensors")["features"].double().numpy()
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) * np.sqrt(8) for v in (image.numpy(), real)]
    expected = metrics.kernel_distance(*unit, subset_size=30)
    assert result.measures["kid"].value == pytest.approx(expected)
    for found in result.measures.values():
        assert found.low <= found.value <= found.high


def test_saved_features_stand_for_the_pictures(sd: Path, protocol: Path, whole: Path, tmp_path: Path) -> None:
    folder, before = copy_of(whole, tmp_path), read_measures(whole)
    for name in ("measures.json", "real.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "features")
    again = run(sd, protocol, folder, real=whole / "real.safetensors")
    assert again.measures == before.measures and again.protocol == before.protocol
    assert len(compare([whole, folder])) == 2


@pytest.fixture(scope="module")
def subject(clip: Path) -> tuple[Path, Path]:
    """The protocol `dreambooth-live` of two prompts by tiny networks, and two pictures of the shipped emoji."""
    folder = clip.parent / "subject"
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**size, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "dino")
    side = {"height": 16, "width": 16}
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "size": side}))
    (folder / "real").mkdir()
    with tarfile.open(Path(__file__).parents[1] / "emoji" / "data" / "heldout-labels-0000.tar") as tar:
        for name in ("1f4ef_flat.webp", "26f0_noto.webp"):
            Image.open(tar.extractfile(name)).convert("RGB").resize((20, 24)).save(folder / "real" / f"{name}.png")
    (folder / "prompts.txt").write_text("# a comment\na {subject} in the snow\na red {subject}\n")
    value = {
        **load_protocol("dreambooth-live")[0].model_dump(include={"metrics"}),
        "name": "subject",
        "prompts": {"source": "this test", "file": "prompts.txt", "count": 2},
        "images_per_prompt": 2,
        "steps": 2,
        "guidance_scale": 1,
        "clip": {"model": "tiny", "source": "this test", "file": "../clip"},
        "dino": {"model": "tiny-vit", "source": "this test", "file": "dino"},
        "real": {"source": "this test"},
    }
    (folder / "subject.yaml").write_text(yaml.safe_dump(value))
    return folder / "subject.yaml", folder / "real"


def test_likeness_to_a_subject_is_the_mean_cosine_with_all_of_its_pictures(sd, subject, clip, tmp_path) -> None:
    protocol, real = subject
    result = run(sd, protocol, tmp_path / "measured", subject="sks dog", real=real)
    shards = sorted(tmp_path.glob("measured/pictures/*.tar"))
    drawn, prompts = zip(*(pair for path in shards for pair in read_shard(path)), strict=True)
    assert prompts == ("a sks dog in the snow",) * 2 + ("a red sks dog",) * 2 and result.protocol["count"] == 4
    theirs = [Image.open(path) for path in sorted(real.iterdir())]
    vit = ViTModel.from_pretrained(protocol.parent / "dino", add_pooling_layer=False)

    def by_vit(pictures):
        pixels = torch.stack([torch.from_numpy(np.array(p.resize((16, 16), 2))).permute(2, 0, 1) for p in pictures])
        with torch.no_grad():
            return vit(pixel_values=pixels / 127.5 - 1).last_hidden_state[:, 0]

    for name, embed in (("dino", by_vit), ("clip_i", lambda pictures: Clip.load(clip)(pictures)["image"])):
        ours, others = (torch.nn.functional.normalize(embed(pictures)) for pictures in (drawn, theirs))
        assert result.measures[name].value == pytest.approx(float((ours @ others.T).mean()), abs=1e-5)
    found = Clip.load(clip)(drawn, prompts)
    clip_t = torch.nn.functional.cosine_similarity(found["image"], found["text"]).mean()
    assert result.measures["clip_score"].value == pytest.approx(float(clip_t), abs=1e-5)
    assert "tiny-I" in (tmp_path / "measured" / "measures.md").read_text()


def test_a_subject_must_be_pictures(sd, subject, clip, tmp_path) -> None:
    protocol, real = subject
    (tmp_path / "empty").mkdir()
    for given, message in (
        ({}, "give --real PATH"),
        ({"real": tmp_path / "empty"}, "0 pictures in it: give at least 1"),
        ({"real": clip / "model.safetensors"}, "needs the subject's pictures themselves"),
        ({"real": real, "weights": {"dino": tmp_path / "empty"}}, "no ViTModel there"),
        ({"real": real, "weights": {"dino": clip}}, "which a ViTModel needs|not a ViTModel of transformers"),
    ):
        with pytest.raises(UserError, match=message):
            run(sd, protocol, tmp_path / "measured", subject="sks dog", **given)
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize(("kind", "own"), [("live", "in a chef outfit"), ("object", "floating in an ocean of milk")])
def test_prompts_about_a_subject_are_those_of_the_paper(kind: str, own: str, tmp_path: Path) -> None:
    chosen, beside = load_protocol(f"dreambooth-{kind}")
    prompts = protocol_prompts(chosen, beside, None, subject="sks dog")
    assert (len(prompts), len(set(prompts)), chosen.metrics) == (100, 25, ["dino", "clip_i", "clip_score"])
    assert all(prompt.startswith("a ") and "sks dog" in prompt for prompt in prompts)
    assert {f"a sks dog {own}", "a cube shaped sks dog", "a sks dog on top of a purple rug in a forest"} <= set(prompts)
    with pytest.raises(UserError, match="give --subject, such as"):
        protocol_prompts(chosen, beside, None, subject=" ")
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(f"a sks dog, {i}\n" for i in range(25)))
    assert len(protocol_prompts(chosen, beside, plain)) == 100
    with pytest.raises(UserError, match=r"have no {subject}: leave it out"):
        protocol_prompts(chosen, beside, plain, subject="sks dog")


def test_two_protocols_are_not_put_side_by_side(whole: Path, tmp_path: Path) -> None:
    result = read_json(whole / "measures.json")
    result["protocol"]["guidance_scale"] = 7.5
    (tmp_path / "measures.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"guidance_scale is 7\.5, not 2\.0"):
        compare([whole, tmp_path])


def copy_of(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_features_prepared_differently_are_refused(sd: Path, protocol: Path, whole: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(protocol.read_text()) | {"resize": 14}
    other = protocol.with_name("other.yaml")
    other.write_text(yaml.safe_dump(value))
    with pytest.raises(UserError, match="features by another preparation"):
        run(sd, other, tmp_path / "new", real=whole / "real.safetensors")
    again = run(sd, other, copy_of(whole, tmp_path))  # the same pictures with other preprocessing
    assert again.measures != read_measures(whole).measures


def test_pictures_that_are_drawn_again_are_measured_again(sd, protocol: Path, whole: Path, tmp_path: Path) -> None:
    """The advice for pictures of another model or another drawing is to delete their folder, not that of features."""
    folder, (chosen, beside) = copy_of(whole, tmp_path), load_protocol(protocol)
    shutil.rmtree(folder / "pictures")
    given = {"files": ProtocolFiles(beside, real=whole / "real.safetensors"), "drawing": Drawing.given(steps=1)}
    again = measure(sd, chosen, PROMPTS, folder, **given)
    paths = sorted(folder.glob("pictures/*.tar"))
    pictures, prompts = zip(*(pair for path in paths for pair in read_shard(path)), strict=True)
    found = Clip.load(beside / "clip")([extraction.prepared(p, 12, "bicubic", 90) for p in pictures], prompts)
    cosine = torch.nn.functional.cosine_similarity(found["image"], found["text"]).mean()
    assert again.measures["clip_score"].value == pytest.approx(float(cosine), abs=1e-5)
    assert abs(again.measures["clip_score"].value - read_measures(whole).measures["clip_score"].value) > 1e-4


def test_damaged_files_are_made_again_or_named(sd: Path, protocol: Path, whole: Path, tmp_path: Path) -> None:
    folder, expected = copy_of(whole, tmp_path), (whole / "measures.json").read_bytes()
    first, second, _ = sorted(folder.glob("features/clip-*/*"))
    first.write_bytes(first.read_bytes()[:900])
    save_file({name: value[:3] for name, value in load_file(second).items()}, second)
    shutil.copy(second, second.with_name("00009.safetensors"))
    run(sd, protocol, folder)
    assert (folder / "measures.json").read_bytes() == expected
    shard = folder / "pictures" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:20480])
    first.with_name("00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"00001\.tar: .*delete it"):
        run(sd, protocol, folder)
    shard.unlink()
    run(sd, protocol, folder)
    assert (folder / "measures.json").read_bytes() == expected


def test_a_broken_real_picture_is_named_before_anything_is_drawn(sd: Path, protocol: Path, tmp_path: Path) -> None:
    real = Path(shutil.copytree(protocol.parent / "real", tmp_path / "real"))
    (real / "00.png").write_bytes((real / "00.png").read_bytes()[:200])
    (real / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"00\.png: .*remove it or fix it"):
        run(sd, protocol, tmp_path / "out", real=real)
    assert not list((tmp_path / "out").rglob("*.tar"))
    for path in sorted(real.glob("*.png"))[:25]:
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match="too few for KID"):
        run(sd, protocol, tmp_path / "out", real=real)


def test_pictures_of_unknown_origin_are_not_used(sd: Path, protocol: Path, whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    (folder / "pictures" / "spec.json").unlink()
    with pytest.raises(UserError, match=r"without a spec\.json"):
        run(sd, protocol, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 0}'])
def test_a_damaged_spec_says_how_to_fix_it(sd: Path, protocol: Path, whole: Path, tmp_path: Path, text: str) -> None:
    pictures = copy_of(whole, tmp_path) / "pictures"
    (pictures / "spec.json").write_text(text)
    fix = rf"{pictures}/spec\.json: .*: delete {pictures} to draw again, or give another --output"
    with pytest.raises(UserError, match=fix) as error:
        run(sd, protocol, pictures.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "5", '{"protocol": {}, "measures": {}, "model": {}}'])
def test_damaged_results_are_one_line(whole: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "measures.json").write_text(text)
    with pytest.raises(UserError, match="damaged, or of another version"):
        compare([whole, tmp_path])
    with pytest.raises(UserError, match="given twice"):
        compare([whole, whole / ".." / whole.name])


def test_another_model_is_refused_before_it_draws(sdxl: Path, protocol: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"drawn with another .*model"):
        run(sdxl, protocol, whole)


def test_another_noise_schedule_is_refused_before_it_draws(sd: Path, protocol: Path, whole: Path, tmp_path) -> None:
    other = Path(shutil.copytree(sd, tmp_path / "sd"))
    config = other / "scheduler" / "scheduler_config.json"
    own = config.read_text()
    config.write_text(own.replace("0.012", "0.02"))
    with pytest.raises(UserError, match="drawn with another schedule: delete that folder"):
        run(other, protocol, whole)
    for spacing in ("trailing", "linspace"):  # decides at which noise levels the sampler calls the denoiser
        config.write_text(json.dumps(json.loads(own) | {"timestep_spacing": spacing}))
        with pytest.raises(UserError, match="drawn with another scheduler: delete that folder"):
            run(other, protocol, whole)


@pytest.mark.parametrize("name", protocol_names())
def test_shipped_protocols_say_where_their_prompts_are(name: str) -> None:
    chosen, beside = load_protocol(name)
    with pytest.raises(UserError, match=r"give --prompts FILE\. It (is|takes) |its prompts are about a subject"):
        protocol_prompts(chosen, beside, None)


def test_prompts_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('file_name,text\na.jpg,"a cat, sitting"\nb.jpg,a dog\n')
    given = {"name": "x", "metrics": ["is"], "prompts": {"source": "Here.", "count": 2}}
    assert protocol_prompts(Protocol(**given), tmp_path, path) == ["a cat, sitting", "a dog"]
    given["prompts"]["sha256"] = prompts_hash(["a cat, sitting", "a cow"])
    with pytest.raises(UserError, match=r"their hash differs\)\. Here\."):
        protocol_prompts(Protocol(**given), tmp_path, path)
    given["prompts"]["count"] = 3
    with pytest.raises(UserError, match="2 prompts; protocol x needs 3"):
        protocol_prompts(Protocol(**given), tmp_path, path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column of prompts"):
        protocol_prompts(Protocol(**given), tmp_path, path)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.CSV", "Prompt\n1 cat\n2 dogs\n", ["1 cat", "2 dogs"]),
        ("a.csv", 'text\n"one\ntwo"\na \u2028 line\n', ["one\ntwo", "a \u2028 line"]),
        ("a.tsv", 'Prompt\tNote\n"quoted, not\tx\nnext\ty\n', ['"quoted, not', "next"]),
        ("a.txt", "# no\none\r\n\r\ntwo \x0b words\rthree", ["one", "two \x0b words", "three"]),
        ("a.csv", 'text\na\n"never closed\nb\n', "not readable as CSV"),
        ("a.csv", "n,text\n1,a\n2,\n", "row 2 has no prompt"),
        ("a.csv", f"text\n{'x' * 200_000}\n", "not readable as CSV"),
        ("a.txt", "a\0b\n", "zero byte"),
        ("a.txt", "# only this\n", "contains no prompt"),
    ],
)
def test_prompt_files_are_read_as_they_are_meant(tmp_path: Path, name: str, text: str, found: object) -> None:
    (tmp_path / name).write_bytes(text.encode())
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            read_prompt_file(tmp_path / name)
    else:
        assert read_prompt_file(tmp_path / name) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["fidd"]}, "no metric 'fidd'"),
        ({"metrics": ["fid"]}, "give 'real'"),
        ({"metrics": ["clip_score"]}, "need 'clip'"),
        ({"name": "../evil"}, "name"),
        ({"seed": 2**70}, "seed"),
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
    ],
)
def test_bad_protocols_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    value = {"name": "x", "metrics": ["is"], "prompts": {"source": "Here."}, **change}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(UserError, match=message):
        load_protocol(tmp_path / "x.yaml")


def test_missing_weights_are_asked_for_before_anything_is_drawn(sd: Path, tmp_path: Path) -> None:
    chosen = Protocol(name="x", metrics=["is"], prompts={"source": "Here."})
    with pytest.raises(UserError, match="give --weights inception=PATH"):
        measure(sd, chosen, PROMPTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
