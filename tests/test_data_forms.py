"""Data in the formats that `datasets` writes: equal to what `datasets` reads, or refused in one line."""

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from test_pictures import encoded, metadata, picture, read, shard, table, why_not, write

from prunet.data import contents
from prunet.data.contents import has_files, remember, source_files, source_fingerprint
from prunet.data.encoding import pictures_are_gone
from prunet.data.pictures import BrokenPicture
from prunet.data.sources import check_source, read_pictures
from prunet.errors import UserError
from prunet.recipe.recipe import Data

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
COLORS = ("red", "lime", "blue", "white")


def made(folder: Path, colors=COLORS, image_column="image", caption_column="text", captions=None):
    """A dataset of pictures that are files in `folder`."""
    files = [str(write(folder / f"{color}.png", encoded(picture(color)))) for color in colors]
    columns = {image_column: files, caption_column: captions or [f"a {color} thing" for color in colors]}
    return datasets.Dataset.from_dict(columns).cast_column(image_column, datasets.Image())


def pixels(source, **options) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    found = []
    for sample in read_pictures(source, **options):
        with suppress(BrokenPicture):
            found.append((sample.open().getpixel((0, 0)), sample.captions))
    return found


def as_datasets_reads(rows) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    return [(row["image"].convert("RGB").getpixel((0, 0)), (row["text"],)) for row in rows if row["text"]]


@pytest.mark.parametrize("captions", [None, [None, "b", "", "d"]])
@pytest.mark.parametrize("form", ["whole", "two files", "numpy", "other columns"])
def test_a_saved_dataset_is_read_as_datasets_reads_it(tmp_path, form, captions):
    rows, folder, options = made(tmp_path / "files", captions=captions), tmp_path / "saved", {}
    rows = rows.with_format("numpy") if form == "numpy" else rows
    saved = rows.rename_columns({"image": "png", "text": "label"}) if form == "other columns" else rows
    saved.save_to_disk(folder, num_shards=2 if form == "two files" else 1)
    shutil.rmtree(tmp_path / "files")  # the pictures are in the dataset
    if form == "other columns":
        assert "no picture column image; it has png, label" in why_not(folder)
        assert "no caption column" in why_not(folder, image_column="png")
        options = {"image_column": "png", "caption_column": "label"}
    again = datasets.load_from_disk(str(folder)).with_format(None)
    again = again.rename_columns({"png": "image", "label": "text"}) if form == "other columns" else again
    check_source(folder, **options)
    assert pixels(folder, **options) == as_datasets_reads(again)
    usable, broken = read(str(folder), **options)
    assert [*usable, *broken] == [f"saved/{n:08d}" for n in ((1, 3, 0, 2) if captions else range(4))]
    assert all("no caption in column" in why for why in broken.values())


def test_the_train_split_is_read_or_the_one_that_is_named(tmp_path):
    parts = {"train": made(tmp_path / "a", COLORS[:2]), "test": made(tmp_path / "b", COLORS[2:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert [captions for _, captions in pixels(tmp_path / "both")] == [("a red thing",), ("a lime thing",)]
    assert list(read(tmp_path / "both" / "test")[0]) == ["test/00000000", "test/00000001"]
    datasets.DatasetDict(test=parts["test"]).save_to_disk(tmp_path / "one")
    assert pixels(tmp_path / "one") == pixels(tmp_path / "both" / "test")
    datasets.DatasetDict(val=parts["train"], test=parts["test"]).save_to_disk(tmp_path / "neither")
    message = why_not(tmp_path / "neither")
    assert f"holds the splits test, val; name one, such as {tmp_path / 'neither' / 'test'}" in message
    shutil.rmtree(tmp_path / "neither/test"), shutil.rmtree(tmp_path / "neither/val")
    assert "holds no split" in why_not(tmp_path / "neither")


def test_a_damaged_saved_dataset_is_one_line(tmp_path):
    for name, change in {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:300]),
        "gone": lambda path: path.unlink(),
        "state": lambda path: (path.parent / "state.json").write_text("{"),
        "info": lambda path: (path.parent / "dataset_info.json").write_text('{"features": {"x": {"_type": "Evil"}}}'),
    }.items():
        folder = tmp_path / name
        made(tmp_path / "files").save_to_disk(folder)
        change(next(folder.glob("*.arrow")))
        assert str(folder) in why_not(folder)
    made(tmp_path / "files").remove_columns("image").add_column("image", [1, 2, 3, 4]).save_to_disk(tmp_path / "ints")
    assert "column image does not hold pictures" in why_not(tmp_path / "ints")


def test_a_saved_dataset_is_known_by_its_files_and_may_be_deleted(tmp_path):
    folder = tmp_path / "saved"
    made(tmp_path / "files").save_to_disk(folder)
    before = source_files(folder)
    assert before and source_files(folder) == before and has_files(folder)
    pixels(folder)
    assert source_files(folder) == before, "reading leaves nothing there"
    made(tmp_path / "files", COLORS[:3]).save_to_disk(tmp_path / "other")
    assert source_files(tmp_path / "other") != before
    assert not pictures_are_gone(Data(source=str(folder)), tmp_path)


def test_parquet_as_datasets_writes_it_with_bytes_or_paths(tmp_path):
    rows = made(tmp_path / "data/files")
    rows.to_parquet(tmp_path / "data/paths.parquet")  # datasets 5 writes only paths
    rows.save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(str(tmp_path / "saved")).to_parquet(tmp_path / "bytes.parquet")
    expected = as_datasets_reads(rows)
    assert pixels(tmp_path / "data/paths.parquet") == pixels(tmp_path / "bytes.parquet") == expected
    shutil.copy(tmp_path / "data/paths.parquet", tmp_path / "away.parquet")
    assert pixels(tmp_path / "away.parquet") == expected
    (tmp_path / "else").mkdir()
    shutil.move(tmp_path / "away.parquet", tmp_path / "else/away.parquet")
    before = source_fingerprint(tmp_path / "data/paths.parquet")
    picture(COLORS[0]).point(lambda value: 255 - value).save(tmp_path / f"data/files/{COLORS[0]}.png")
    assert source_fingerprint(tmp_path / "data/paths.parquet") != before, (
        "the pictures that its rows name are part of it"
    )
    broken = read(tmp_path / "else/away.parquet")[1]
    assert len(broken) == 4 and all("not below the folder of the data" in why for why in broken.values())


@pytest.mark.parametrize("path", ["/etc/hostname.png", "../outside.png", "s/../../outside.png"])
def test_a_row_cannot_name_a_file_outside_its_folder(tmp_path, path):
    write(tmp_path / "outside.png", encoded())
    write(tmp_path / "in/inside.png", encoded())
    table(tmp_path / "in/a.parquet", image=[path, "inside.png", "s/../inside.png"], text=["a", "b", "c"])
    usable, broken = read(tmp_path / "in/a.parquet")
    assert list(usable.values()) == [("b",), ("c",)] and path in broken["a.parquet/00000000"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "image_file_name"])
def test_imagefolder_with_metadata_of_each_kind(tmp_path, ending, column):
    for name in ("b.png", "sub/a.png", "c.png"):
        write(tmp_path / name, encoded(picture(COLORS[len(name) % 4])))
    rows = [(None, "b.png"), ("an a", "sub/a.png"), ("", "c.png"), ("a gone", "gone.png")]
    table_ = datasets.Dataset.from_dict({column: [file for _, file in rows], "text": [text for text, _ in rows]})
    path = tmp_path / f"metadata.{ending}"
    {"jsonl": table_.to_json, "csv": table_.to_csv, "parquet": table_.to_parquet}[ending](path)
    usable, broken = read(tmp_path)
    assert usable == {"sub/a.png": ("an a",)} and list(broken) == ["b.png", "c.png", "gone.png"]
    assert all(f"metadata.{ending}, " in broken[name] for name in ("b.png", "c.png"))
    check_source(tmp_path)
    before, size = source_files(tmp_path), path.stat().st_size
    path.write_bytes(path.read_bytes().replace(b"an a", b"a an"))
    assert source_files(tmp_path) != before and path.stat().st_size == size, "what a list says decides"
    write(
        path, path.read_bytes()[: path.stat().st_size // 2] if ending == "parquet" else "\0\n\0,\xff".encode("latin-1")
    )
    assert str(path) in why_not(tmp_path)


@pytest.mark.parametrize("first", [{}, {"text": None}, {"text": ""}, {"text": " \t"}, {"other": "x"}, {"caption": " "}])
def test_rows_without_a_caption_are_skipped_wherever_they_stand(tmp_path, first):
    for name in "abc":
        write(tmp_path / f"{name}.png", encoded())
    rows = [
        {"file_name": "a.png", **first},
        {"file_name": "b.png", "text": "b"},
        {"file_name": "c.png", "caption": "c"},
    ]
    for number in range(3):
        metadata(tmp_path, *rows[number:], *rows[:number])
        usable, broken = read(tmp_path)
        assert usable == {"b.png": ("b",), "c.png": ("c",)}
        assert list(broken) == ["a.png"] and f"metadata.jsonl, line {(3 - number) % 3 + 1}" in broken["a.png"]
        check_source(tmp_path)
    metadata(tmp_path, *({"file_name": f"{name}.png", "tag": "x"} for name in "abc"))
    assert "line 1: no caption column" in why_not(tmp_path) and "it has file_name, tag" in why_not(tmp_path)


def test_a_list_captions_its_own_folder_and_text_files_the_others(tmp_path):
    for name in ("list/a", "list/sub/unlisted", "beside/b", "beside/c", "d"):
        write(tmp_path / f"{name}.png", encoded())
        write(tmp_path / f"{name}.txt", f"text of {name}")
    metadata(tmp_path / "list", {"file_name": "a.png", "text": "listed"})
    (tmp_path / "beside/c.txt").unlink()
    usable, broken = read(tmp_path)
    assert usable == {"d.png": ("text of d",), "beside/b.png": ("text of beside/b",), "list/a.png": ("listed",)}
    assert list(broken) == ["beside/c.png"]
    usable, broken = read(tmp_path, caption_column="text")
    assert list(usable) == ["list/a.png"] and "no list of captions" in broken["d.png"]


def test_one_column_name_twice_is_refused(tmp_path):
    write(tmp_path / "a.png", encoded())
    write(tmp_path / "metadata.csv", "file_name,text,text\na.png,a,b\n")
    assert "two columns are called text" in why_not(tmp_path)


def test_files_behind_links_decide_whether_a_source_is_the_same(tmp_path):
    write(tmp_path / "real/a.png", encoded())
    write(tmp_path / "real/a.txt", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    before = source_files(tmp_path / "data")
    assert [name for name, _ in before] == ["link/a.png", "link/a.txt"]
    write(tmp_path / "real/a.txt", "b")
    assert source_files(tmp_path / "data") != before
    write(tmp_path / "data/.DS_Store", "x")
    assert [name for name, _ in source_files(tmp_path / "data")] == ["link/a.png", "link/a.txt"]


@pytest.mark.parametrize("form", ["bmp", "tar", "parquet", "arrow"])
def test_contents_that_change_at_equal_size_make_another_source(tmp_path, form, monkeypatch):
    """Pictures are painted over and shards packed again; unchanged files are not read again."""
    source = tmp_path / "data"
    if form == "bmp":
        write(source / "a.txt", "a"), write(source / "a.bmp", encoded(picture("red"), "BMP"))
    elif form == "tar":
        shard(source / "a.tar", {"a.bmp": encoded(picture("red"), "BMP"), "a.txt": "a"})
    else:
        made(tmp_path / "files").save_to_disk(source)
        if form == "parquet":
            rows = datasets.load_from_disk(str(source))
            shutil.rmtree(source), write(source / "b", ""), rows.to_parquet(source / "a.parquet")
    file = next(source.glob(f"*.{form}"))
    cache = tmp_path / "cache"
    before = source_fingerprint(source)
    remember(source, cache, before)
    write(cache / "spec.json", "{}")
    shutil.copytree(source, tmp_path / "copy")
    assert source_fingerprint(tmp_path / "copy") == before, "where it lies does not matter"
    contents.known_here.clear()  # as in a new process
    with monkeypatch.context() as patch:
        patch.setattr(contents, "file_hash", lambda file: pytest.fail("it is known"))
        assert source_fingerprint(source, cache) == before
    data, when = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert source_fingerprint(source, cache) != before and file.stat().st_size == when.st_size


def test_caches_that_know_pictures_by_their_size_stay_valid(tmp_path):
    write(tmp_path / "data/a.png", encoded()), write(tmp_path / "data/a.txt", "a")
    size = (tmp_path / "data/a.png").stat().st_size
    known = [["a.png", size], ["a.txt", hashlib.sha256(b"a").hexdigest()]]
    old = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    keys = ("format", "parts", "data", "content", "empty_prompt", "seed")
    write(tmp_path / "cache/spec.json", json.dumps({**dict.fromkeys(keys), "content": old}))
    assert source_fingerprint(tmp_path / "data", tmp_path / "cache") == old
    write(tmp_path / "data/a.txt", "b")
    assert source_fingerprint(tmp_path / "data", tmp_path / "cache") == source_fingerprint(tmp_path / "data") != old


def mutated(data: bytes, random: Random) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(out)) if out else 0
        match random.randrange(5):
            case 0:
                out[at : at + 1] = random.randbytes(1)
            case 1:
                out[at : at + random.randint(1, 60)] = random.randbytes(random.randint(0, 60))
            case 2:
                del out[at:]
            case 3:
                out[at:at] = out[: random.randint(0, 600)]
            case 4:
                out[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(out)


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_data_of_every_form_is_named_or_refused_in_a_line(tmp_path, count):
    whole = tmp_path / "whole"
    rows = made(tmp_path / "files")
    rows.save_to_disk(whole / "saved")
    datasets.load_from_disk(str(whole / "saved")).to_parquet(whole / "a.parquet")
    members = {"a.png": encoded(), "a.txt": "a", "b.jpg": encoded(format="JPEG"), "b.json": '{"text": "b"}'}
    shard(whole / "a.tar", members), shard(whole / "b.tar.gz", {**members, "l" * 120 + ".png": encoded()})
    for name in ("jsonl", "csv", "parquet"):
        write(whole / name / "a.png", encoded())
        row = datasets.Dataset.from_dict({"file_name": ["a.png"], "text": ["a, b"]})
        {"jsonl": row.to_json, "csv": row.to_csv, "parquet": row.to_parquet}[name](whole / name / f"metadata.{name}")
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        write(whole / f"beside/{kind}.{kind.lower()}", encoded(picture(size=(20, 20)), kind))
        write(whole / f"beside/{kind}.txt", "a")
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    for number in range(count):
        random = Random(number)
        path = random.choice(files)
        source = whole / path.relative_to(whole).parts[0]
        good, started = path.read_bytes(), time.process_time()
        path.write_bytes(mutated(good, random))
        try:
            for sample in read_pictures(source):
                with suppress(BrokenPicture):
                    sample.open()
            check_source(source)
            source_files(source)
        except UserError as error:
            assert "\n" not in str(error), number
        assert time.process_time() - started < 10, number
        path.write_bytes(good)
