"""The cache: what it stores, that a killed one resumes, and that it is refused for other teachers and data."""

import io
import json
import shutil
import tarfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pictures, make_pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunet import Cache, Teacher, UserError, cache
from prunet.data import cache as blocks
from prunet.data import encoding as latents
from prunet.data.pictures import bucket_sizes, fit
from prunet.recipe.recipe import Data


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "BLOCK", 4)


def test_holds_the_outputs_of_the_teachers_parts(sd, pictures, tmp_path) -> None:
    teacher = Teacher(sd)
    made = cache(teacher, Data(source=str(pictures)), tmp_path / "c")
    assert len(made) == 12
    pipe = teacher.pipeline()
    image = Image.open(pictures / "003.png")
    dist = pipe.vae.encode(fit(image, 16).pixels[None]).latent_dist
    sample = made.sample(3)
    torch.testing.assert_close(sample.mean, dist.mean[0] * pipe.vae.config.scaling_factor, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(sample.std, dist.std[0] * pipe.vae.config.scaling_factor, atol=2e-3, rtol=2e-3)
    embeds, _ = pipe.encode_prompt("picture 3", "cpu", 1, False)
    torch.testing.assert_close(sample.condition["prompt_embeds"], embeds[0], atol=2e-3, rtol=2e-3)
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    torch.testing.assert_close(made.unconditional["prompt_embeds"], empty, atol=2e-3, rtol=2e-3)


def test_sdxl_keeps_pooled_embeddings_and_micro_conditioning(sdxl, tmp_path) -> None:
    folder = make_pictures(tmp_path / "p", count=3, size=4000 // 100)
    teacher = Teacher(sdxl)
    made = cache(teacher, Data(source=str(folder), crop="random"), tmp_path / "c")
    sample = made.sample(1)
    embeds, _, pooled, _ = teacher.pipeline().encode_prompt(
        "picture 1", device="cpu", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(sample.condition["prompt_embeds"], embeds[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(sample.condition["pooled"], pooled[0], atol=2e-3, rtol=2e-3)
    height, width, _, _, *target = sample.condition["time_ids"].tolist()
    assert (height, width) == (40, 41)
    assert target == [16, 16]
    assert made.unconditional["prompt_embeds"].abs().sum() == 0, (
        "SDXL's empty prompt is zeros where its pipeline says so"
    )


def test_killed_and_resumed_ends_in_the_same_bytes(sd, pictures, tmp_path, small_shards, monkeypatch) -> None:
    data = Data(source=str(pictures), flip=True, crop="random", views=2)
    cache(Teacher(sd), data, tmp_path / "whole", seed=3)
    save_file = latents.save_file

    def dies(tensors, path, **options):
        save_file(tensors, path, **options)
        if path.name == "shard-00003.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(latents, "save_file", dies)
        cache(Teacher(sd), data, tmp_path / "parts", seed=3)
    assert not (tmp_path / "parts" / "cache.json").exists()
    with pytest.raises(UserError, match="no finished cache"):
        Cache.open(tmp_path / "parts")
    (tmp_path / "parts" / ".shard-00003.safetensors.part").write_bytes(b"half a shard")
    encoded = []
    teacher = Teacher(sd)
    real = teacher.encode_images
    teacher.encode_images = lambda pixels: encoded.append(len(pixels)) or real(pixels)
    made = cache(teacher, data, tmp_path / "parts", seed=3)
    assert sum(encoded) == 24 - 3 * 4, "finished shards were encoded again"
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    assert len(made) == 24


def test_broken_pictures_are_skipped_counted_and_named(sd, tmp_path, capsys) -> None:
    folder = make_pictures(tmp_path / "p", count=5)
    (folder / "002.png").write_bytes(b"not a picture")
    (folder / "004.txt").unlink()
    made = cache(Teacher(sd), Data(source=str(folder)), tmp_path / "c")
    assert len(made) == 3
    assert [key for key, _ in made.skipped] == ["002.png", "004.png"]
    assert "2 pictures skipped" in capsys.readouterr().err


def test_data_with_nothing_usable_are_refused(sd, tmp_path) -> None:
    folder = make_pictures(tmp_path / "p", count=2)
    for file in folder.glob("*.png"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="no usable picture"):
        cache(Teacher(sd), Data(source=str(folder)), tmp_path / "c")


def test_labelled_with_shapes_dtypes_and_fingerprint(sd, pictures, tmp_path) -> None:
    teacher = Teacher(sd)
    cache(teacher, Data(source=str(pictures)), tmp_path / "c")
    with safe_open(tmp_path / "c" / "shard-00000.safetensors", framework="pt") as file:
        assert file.get_slice("mean").get_shape() == [12, 4, 8, 8]
        assert file.get_slice("prompt_embeds").get_shape() == [12, 77, 16]
        assert file.get_slice("mean").get_dtype() == "F16"
        assert json.loads(file.metadata()["label"])["captions"][3] == "picture 3"
    spec = json.loads((tmp_path / "c" / "spec.json").read_text())
    assert spec["parts"] == {part: teacher.fingerprint([part]) for part in ("text_encoder", "vae")}


def test_other_teacher_or_data_is_refused(sd, pictures, tmp_path) -> None:
    cache(Teacher(sd), Data(source=str(pictures)), tmp_path / "c")
    with pytest.raises(UserError, match="another teacher or other data"):
        cache(Teacher(sd), Data(source=str(pictures), flip=True), tmp_path / "c")
    other = make_pipeline(tmp_path / "other", "sd", seed=4)
    with pytest.raises(UserError, match="another teacher or other data"):
        cache(Teacher(other), Data(source=str(pictures)), tmp_path / "c")


def test_another_unet_may_use_the_same_latents(sd, pictures, tmp_path) -> None:
    """Latents of pictures depend only on VAE and text encoder."""
    made = cache(Teacher(sd), Data(source=str(pictures)), tmp_path / "c")
    other = make_pipeline(tmp_path / "other", "sd", seed=4)
    for part in ("vae", "text_encoder"):
        for file in (sd / part).iterdir():
            (other / part / file.name).write_bytes(file.read_bytes())
    made.check(Teacher(other))


def test_damaged_shard_is_one_clear_line(sd, pictures, tmp_path) -> None:
    cache(Teacher(sd), Data(source=str(pictures)), tmp_path / "c")
    shard = tmp_path / "c" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    blocks._opened.cache_clear()
    with pytest.raises(UserError, match="damaged"):
        Cache.open(tmp_path / "c")


def test_the_advice_for_a_damaged_cache_fixes_it(sd, pictures, tmp_path) -> None:
    folder, data = tmp_path / "c", Data(source=str(pictures))
    whole = cache(Teacher(sd), data, folder).unconditional["prompt_embeds"]
    empty = folder / "unconditional.safetensors"
    empty.unlink()
    blocks._opened.cache_clear()
    with pytest.raises(UserError, match=f"{empty}: missing.*: delete {folder / 'cache.json'} and run") as error:
        _ = Cache.open(folder).unconditional
    assert "\n" not in str(error.value)
    (folder / "cache.json").unlink()
    assert cache(Teacher(sd), data, folder).unconditional["prompt_embeds"].equal(whole)


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"format": 2}', None])
def test_damaged_labels_say_how_to_fix_them(sd, pictures, tmp_path, text) -> None:
    folder, data = tmp_path / "c", Data(source=str(pictures))
    cache(Teacher(sd), data, folder)
    spec, index = folder / "spec.json", folder / "cache.json"
    whole = spec.read_text()
    spec.write_text(text) if text else spec.unlink()
    fix = f"{spec}: .*: delete {folder}, or give another cache with 'cache:'"
    with pytest.raises(UserError, match=fix) as error:
        Cache.open(folder)
    assert "\n" not in str(error.value)
    if text:
        with pytest.raises(UserError, match=fix):
            cache(Teacher(sd), data, folder)
    spec.write_text(whole)
    index.write_text(text or "")
    with pytest.raises(UserError, match=f"{index}: .*: delete it and run the cache again"):
        Cache.open(folder)
    index.unlink()
    assert len(cache(Teacher(sd), data, folder)) == 12


def test_views_see_other_crops_and_captions(sd, tmp_path, monkeypatch) -> None:
    folder = make_pictures(tmp_path / "p", count=5, size=40)
    for file in folder.glob("*.txt"):
        file.write_text("one\ntwo\nthree\n")
    (folder / "004.png").write_bytes(b"")
    shown = []  # the total of the bar, then each step
    monkeypatch.setattr(latents, "progress", lambda _, total: shown.append(total) or nullcontext(bar))
    bar = SimpleNamespace(advance=shown.append)
    made = cache(Teacher(sd), Data(source=str(folder), crop="random", flip=True, views=6), tmp_path / "c")
    assert len(made) == 24
    assert shown[0] == 30 == sum(shown[1:]) and len(shown) > 2, "progress within a block, skipped pictures included"
    means = [made.sample(i).mean for i in range(6)]
    assert not all(torch.equal(means[0], m) for m in means[1:])
    with safe_open(tmp_path / "c" / "shard-00000.safetensors", framework="pt") as file:
        assert set(json.loads(file.metadata()["label"])["captions"]) == {"one", "two", "three"}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_alone(kind, request, tmp_path, monkeypatch, small_shards) -> None:
    """The teacher draws the latents: stock output, std 0, and no sample depends on the batch it was drawn in."""
    teacher = Teacher(request.getfixturevalue(kind))
    data = Data(prompts=["a", "b", "c"], images_per_prompt=2, steps=2, guidance_scale=3.0)
    made = cache(teacher, data, tmp_path / "c")
    assert len(made) == 6
    assert all(made.sample(i).std.abs().sum() == 0 for i in range(6))
    assert not torch.equal(made.sample(0).mean, made.sample(1).mean)
    monkeypatch.setattr(latents, "ENCODE_BATCH", 1)
    alone = cache(teacher, data, tmp_path / "alone")
    for i in range(6):
        torch.testing.assert_close(made.sample(i).mean, alone.sample(i).mean, atol=5e-3, rtol=5e-3)
    assert "unet" in made.spec["parts"]


@pytest.mark.parametrize(
    ("file", "change", "of_prompts", "of_pictures"),
    [
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            True,
            False,
        ),  # it decides how the teacher draws
        (
            "model_index.json",
            {"force_zeros_for_empty_prompt": False},
            True,
            True,
        ),  # it decides what a dropped caption becomes
    ],
)
def test_spec_knows_what_the_latents_and_embeddings_depend_on(
    sdxl, pictures, tmp_path, file, change, of_prompts, of_pictures
) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "changed")
    before = json.loads((folder / file).read_text())
    assert {key: before.get(key, True) for key in change} != change
    (folder / file).write_text(json.dumps({**before, **change}))
    for data, differs in ((Data(prompts=["a"]), of_prompts), (Data(source=str(pictures)), of_pictures)):
        ours, theirs = (latents.cache_spec(Teacher(source), data, 1) for source in (sdxl, folder))
        assert (ours != theirs) == differs


def test_size_that_the_stages_cannot_halve_is_refused(sd, pictures, tmp_path) -> None:
    with pytest.raises(UserError, match="not a multiple of 16"):
        cache(Teacher(sd), Data(source=str(pictures), size=24), tmp_path / "c")


@pytest.mark.parametrize("other", ["vae", "text_encoder"])
def test_cache_of_another_teacher_keeps_what_it_would_compute_again(sd, pictures, tmp_path, monkeypatch, other) -> None:
    """It equals, byte for byte, a cache made from nothing; the unchanged part is never called."""
    twin = tmp_path / "twin"
    shutil.copytree(sd, twin)
    strange = make_pipeline(tmp_path / "strange", "sd", seed=9)
    shutil.rmtree(twin / other)
    shutil.copytree(strange / other, twin / other)
    data = Data(source=str(pictures))
    first = cache(Teacher(sd), data, tmp_path / "first", seed=1)
    whole = cache(Teacher(twin), data, tmp_path / "whole", seed=1)

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    teacher = Teacher(twin)
    if other == "text_encoder":
        monkeypatch.setattr(teacher, "encode_images", never)
    else:
        encode = teacher.encode_prompts
        monkeypatch.setattr(teacher, "encode_prompts", lambda p, **k: encode(p, **k) if p == [""] else never())
    made = cache(teacher, data, tmp_path / "made", seed=1, like=first)
    shard = "shard-00000.safetensors"
    assert (made.folder / shard).read_bytes() == (whole.folder / shard).read_bytes()
    assert (made.folder / shard).read_bytes() != (first.folder / shard).read_bytes()


def test_buckets_crop_to_the_nearest_shape_and_tell_sdxl(sdxl, tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shapes = [(40, 40), (80, 40), (40, 80), (80, 42), (39, 40)]  # width, height
    for i, shape in enumerate(shapes):
        Image.new("RGB", shape, (40 * i, 90, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    teacher = Teacher(sdxl)
    made = cache(teacher, Data(source=str(folder), size=32, buckets=True), tmp_path / "c")
    samples = [made.sample(i) for i in range(5)]
    assert [tuple(s.mean.shape) for s in samples] == [(4, 16, 16), (4, 12, 20), (4, 20, 12), (4, 12, 20), (4, 16, 16)]
    assert [list(group) for group in made.groups] == [[0, 4], [1, 3], [2]]
    assert made.latent_size == (16, 16)
    assert samples[1].condition["time_ids"].tolist()[:2] == [40, 80]
    assert samples[1].condition["time_ids"].tolist()[4:] == [24, 40]
    alone = teacher.encode_images(fit(Image.open(folder / "2.png"), (40, 24)).pixels[None])
    torch.testing.assert_close(samples[2].mean, alone[0][0], atol=2e-3, rtol=2e-3)


def test_bucket_sizes_at_1024_are_those_of_sdxl() -> None:
    """A few of the list in the paper's appendix I; none has more pixels, all sides are multiples of 64."""
    sizes = bucket_sizes(1024, 32)
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344), (640, 1536), (512, 2048), (1216, 832)} <= set(sizes)
    assert all(h * w <= 1024**2 and h % 64 == w % 64 == 0 for h, w in sizes)
    assert all((w, h) in sizes for h, w in sizes)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("of", ["pictures", "prompts"])
def test_captions_cut_at_the_token_limit_are_counted(kind, of, request, tmp_path, capsys, small_shards) -> None:
    """75 words fit between the first and the last of 77 tokens; later words do not change the embeddings."""
    captions = ["a " * 75, "b " * 76, "c d", "e f " * 400, "g " * 74, "h " * 77]
    if of == "pictures":
        folder = make_pictures(tmp_path / "p", count=6)
        for n, caption in enumerate(captions):
            (folder / f"{n:03d}.txt").write_text(caption)
        data = Data(source=str(folder))
    else:
        data = Data(prompts=captions, steps=1)
    teacher = Teacher(request.getfixturevalue(kind))
    made = cache(teacher, data, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["cut"] == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "cut" in line]
    assert len(lines) == 1 and "3 of 6 captions are cut" in lines[0]
    embeds = teacher.encode_prompts(["b " * 75, "a " * 74])["prompt_embeds"]
    torch.testing.assert_close(made.sample(1).condition["prompt_embeds"], embeds[0], atol=2e-3, rtol=2e-3)
    assert (made.sample(0).condition["prompt_embeds"] - embeds[1]).abs().max() > 0.01, "a caption that fits is whole"


def test_no_message_if_no_caption_is_cut(sd, pictures, tmp_path, capsys) -> None:
    cache(Teacher(sd), Data(source=str(pictures)), tmp_path / "c")
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["cut"] == 0
    assert "cut" not in capsys.readouterr().err


def test_a_saved_dataset_of_pictures_makes_the_cache_of_its_folder(sd, pictures, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(pictures.glob("*.png"))
    texts = [file.with_suffix(".txt").read_text().strip() for file in files]
    rows = datasets.Dataset.from_dict({"image": [str(file) for file in files], "text": texts})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    caches = [cache(Teacher(sd), Data(source=str(s)), tmp_path / f"c-{s.name}") for s in (pictures, tmp_path / "saved")]
    # Not their bytes: a block's checksum is bound to the source that its cache is made of.
    ours, theirs = (load_file(made.folder / "shard-00000.safetensors") for made in caches)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, monkeypatch) -> None:
    """Only one block of captions, pictures and labels is in memory at a time; the encoding is replaced here."""
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")

    def write(teacher, data, path, group, *_) -> None:
        label = {"captions": [picture.captions[0] for picture in group], "skipped": [], "count": len(group)}
        save_file({"mean": torch.zeros(1)}, path, metadata={"label": json.dumps(label)})

    monkeypatch.setattr(latents, "encode_block", write)
    teacher = SimpleNamespace(are_cut=lambda captions: [False] * len(captions))

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w") as tar:
            for number in range(count):
                for ending, contents in (("png", small.getvalue()), ("txt", f"{number} {'a' * 2000}".encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(contents)
                    tar.addfile(member, io.BytesIO(contents))
        tracemalloc.start()
        blocks = latents._encode_pictures(teacher, Data(source=str(folder / "a.tar")), folder, 16, 0, lambda _: {})
        latents.finish(teacher, Data(source=str(folder / "a.tar")), folder, blocks)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(256)  # so that imports and lasting allocations are not counted
    assert peak(3072) < peak(512) + 1_500_000, "all captions together are 6 MB"


def test_opening_reads_the_index_alone_and_groups_are_those_of_the_blocks(sdxl, tmp_path, monkeypatch) -> None:
    folder = make_pictures(tmp_path / "p", count=6, size=40)
    for number in (1, 4):
        Image.new("RGB", (80, 40)).save(folder / f"{number:03d}.png")
    made = cache(Teacher(sdxl), Data(source=str(folder), buckets=True), tmp_path / "c")
    monkeypatch.setattr(blocks, "safe_open", None)
    opened = Cache.open(tmp_path / "c")
    monkeypatch.undo()
    assert sorted(map(list, opened.groups)) == [[0, 2, 3, 5], [1, 4]]
    assert [{opened.size_of(i) for i in group} for group in opened.groups] == [
        {tuple(made.sample(group[0]).mean.shape[1:])} for group in made.groups
    ]
