"""Pictures with captions: every source yields the same stream each time, and names what it cannot use."""

import csv
import gzip
import io
import json
import logging
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunet.data import listing, pictures, shards
from prunet.data.pictures import BrokenPicture, fit
from prunet.data.sources import check_source, read_pictures
from prunet.errors import UserError


def picture(color="red", size=(6, 4), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def encoded(image: Image.Image | None = None, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def shard(path: Path, members: dict[str, bytes | str] | list[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def metadata(folder: Path, *rows: dict, name: str = "metadata.jsonl") -> Path:
    return write(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def read(source, **options) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Returns ({key: captions} of usable samples, {key: reason} of the others); checks what holds for every stream."""
    usable, broken = {}, {}
    keys = []
    for sample in read_pictures(source, **options):
        keys.append(sample.key)
        try:
            image = sample.open()
        except BrokenPicture as error:
            assert error.key == sample.key and "\n" not in error.why and " at 0x" not in error.why
            broken[sample.key] = error.why
        else:
            assert image.mode == "RGB" and sample.captions
            assert all(caption and caption == caption.strip() for caption in sample.captions)
            usable[sample.key] = sample.captions
    assert len(set(keys)) == len(keys)
    assert keys == [sample.key for sample in read_pictures(source, **options)]
    return usable, broken


def why_not(source, call=check_source, **options) -> str:
    with pytest.raises(UserError) as error:
        call(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def opened(tmp_path: Path, data: bytes, name: str = "a.png") -> Image.Image:
    write(tmp_path / name, data)
    write(tmp_path / "a.txt", "a")
    (sample,) = read_pictures(tmp_path)
    return sample.open()


# -- a text file beside each picture


def test_text_beside_pictures_in_nested_folders(tmp_path):
    for name in ("b.png", "a.JPG", "sub/ü.webp", "sub/deep/猫.png"):
        write(tmp_path / name, encoded())
    write(tmp_path / "b.txt", "\ufeff one \r\n\r\ntwo\u2028still two\rthree\n")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub/ü.caption", "kohya")
    write(tmp_path / "sub/deep/猫.txt", "猫")
    write(tmp_path / "README.txt", "not a caption of anything")
    write(tmp_path / ".hidden/x.png", encoded())
    usable, broken = read(tmp_path)
    assert list(usable) == ["a.JPG", "b.png", "sub/ü.webp", "sub/deep/猫.png"] and not broken
    assert usable["b.png"] == ("one", "two\u2028still two", "three")
    assert usable["sub/ü.webp"] == ("kohya",)
    check_source(str(tmp_path))


@pytest.mark.parametrize("text", ["", " ", "\r\n \t\r\n", "\ufeff", "\u00a0\u3000", "\u200b\n\ufeff \u2060", "\0"])
def test_an_invisible_caption_is_no_caption(tmp_path, text):
    for name in ("beside/a.png", "list/a.png"):
        write(tmp_path / name, encoded())
    write(tmp_path / "beside/a.txt", text)
    metadata(tmp_path / "list", {"file_name": "a.png", "text": [text]})
    shard(tmp_path / "a.tar", {"a.png": encoded(), "a.txt": text, "b.png": encoded(), "b.json": json.dumps([text])})
    for source, names in (("beside", ["a.png"]), ("list", ["a.png"]), ("a.tar", ["a.tar/a", "a.tar/b"])):
        usable, broken = read(tmp_path / source)
        assert not usable and list(broken) == names and all("no caption" in why for why in broken.values())


def test_unusable_samples_keep_their_key_and_give_the_reason(tmp_path):
    files = {"good.png": encoded(), "empty.png": b"", "garbage.png": b"GIF89a garbage", "none.png": encoded(),
             "cut.png": encoded(picture(size=(64, 64)))[:-40], "blank.png": encoded(), "latin.png": encoded(),
             "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}  # fmt: skip
    for name, data in files.items():
        write(tmp_path / name, data)
        write(tmp_path / name.replace(name[-4:], ".txt"), "a caption")
    (tmp_path / "none.txt").unlink()
    write(tmp_path / "blank.txt", " \n\r\n")
    write(tmp_path / "latin.txt", "café".encode("latin-1"))
    write(tmp_path / "folder.png/inner.png", encoded())
    write(tmp_path / "folder.png/inner.txt", "inner")
    (tmp_path / "link.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("link", "dangling", "pipe"):
        write(tmp_path / f"{name}.txt", "a caption")
    usable, broken = read(tmp_path)
    assert set(usable) == {"good.png", "link.png", "folder.png/inner.png"}
    assert set(broken) == {*files, "dangling.png", "pipe.png"} - {"good.png"}
    assert "empty" in broken["empty.png"] and "no caption" in broken["none.png"]
    assert "none.txt" in broken["none.png"] and "utf-8" in broken["latin.png"]
    assert "not a picture" in broken["script.jpg"]  # by its content Pillow would have run Ghostscript
    uncaptioned = {sample.key for sample in read_pictures(tmp_path) if not sample.captions}
    assert uncaptioned == {"none.png", "blank.png", "latin.png"}


def test_a_file_name_that_is_not_unicode_can_be_stored(tmp_path):
    try:
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")), encoded())
        write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")), "a")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    ((key, captions),) = read(tmp_path)[0].items()
    assert key.encode() and captions == ("a",)


def test_errors_do_not_keep_the_bytes_alive(tmp_path):
    data = b"garbage" * 1000
    (sample,) = read_pictures(shard(tmp_path / "a.tar", {"a.png": data, "a.txt": "a"}))
    with pytest.raises(BrokenPicture) as info:
        sample.open()
    error, frames = info.value, []
    traceback = error.__traceback__
    while traceback := traceback.tb_next:
        frames.append(traceback.tb_frame)
    assert frames and error.__context__ is None
    assert not any(data == value for frame in frames for value in frame.f_locals.values())
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.key, copy.why) == (error.key, error.why) and str(copy) == f"{error.key}: {error.why}"
    assert pickle.loads(pickle.dumps(sample)).captions == ("a",)  # for worker processes


# -- metadata.jsonl, metadata.csv


def test_metadata_in_row_order_with_captions_of_consecutive_rows(tmp_path):
    for name in ("b.png", "a.png", "sub/c.png", "unlisted.png"):
        write(tmp_path / name, encoded())
    write(tmp_path / "metadata.jsonl",
          b'\xef\xbb\xbf{"file_name": "b.png", "text": " one "}\r\n\r\n'
          b'{"file_name": "b.png", "text": ["two"]}\r\n'
          b'{"file_name": "./sub//c.png", "text": "\\ud83d c"}\r\n{"file_name": "a.png", "text": null}\r\n'
          b'{"file_name": "gone.png", "text": "gone"}')  # fmt: skip
    usable, broken = read(tmp_path)
    assert list(usable.items()) == [("b.png", ("one", "two")), ("sub/c.png", ("? c",))]
    assert list(broken) == ["a.png", "gone.png"]
    assert "line 5" in broken["a.png"] and "no such file" in broken["gone.png"]
    check_source(tmp_path)


def test_csv_with_bom_quotes_and_windows_paths(tmp_path):
    write(tmp_path / "sub/a b.png", encoded())
    write(tmp_path / "sub/metadata.csv", b'\xef\xbb\xbffile_name,caption\r\na b.png,"red, and\nwide"\r\n')
    write(tmp_path / "deep/x/c.png", encoded())
    write(tmp_path / "deep/metadata.csv", "caption,file_name\nc,x\\c.png\n")
    assert list(read(tmp_path)[0].items()) == [("deep/x/c.png", ("c",)), ("sub/a b.png", ("red, and\nwide",))]


def test_caption_column_is_found_or_named(tmp_path):
    write(tmp_path / "a.png", encoded())
    metadata(tmp_path, {"file_name": "a.png", "caption": "long", "tags": "short", "text": ""})
    assert read(tmp_path)[0] == {"a.png": ("long",)}
    assert read(tmp_path, caption_column="tags")[0] == {"a.png": ("short",)}
    message = why_not(tmp_path, caption_column="tgas")
    assert "line 1" in message and "tgas" in message and "tags" in message and "metadata.jsonl" in message


def test_a_decomposed_name_is_found(tmp_path):
    write(tmp_path / "u\u0308.png", encoded())  # as macOS writes it
    metadata(tmp_path, {"file_name": "\u00fc.png", "text": "a"})
    assert read(tmp_path)[0] == {"\u00fc.png": ("a",)}


ROW = '{"file_name": "a.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("jsonl", ROW + "\n{'file_name': 1}\n", "line 3: not a JSON object"),
        ("jsonl", ROW + "[1, 2]\n", "line 2: not a JSON object"),
        ("jsonl", ROW + "[" * 100_000, "line 2: not a JSON object"),
        ("jsonl", ROW + '{"text": "b"}\n', "line 2: no file_name"),
        ("jsonl", ROW + '{"file_name": "../x.png"}', "line 2: ../x.png is not"),
        ("jsonl", ROW + '{"file_name": "s/../../x.png"}', "line 2: s/../../x.png is not"),
        ("jsonl", ROW + '{"file_name": "/etc/x.png"}', "line 2: /etc/x.png is not"),
        ("jsonl", ROW + '{"file_name": "..\\\\x.png"}', "line 2: ..\\x.png is not"),
        ("jsonl", ROW + '{"file_name": "C:\\\\x.png"}', "line 2: C:\\x.png is not"),
        ("jsonl", ROW + ROW.replace("a.", "b.") + ROW, "line 3: a.png was listed before"),
        ("jsonl", ROW.encode() + b'{"file_name": "caf\xe9.png"}', "line 2: cannot be read as"),
        ("jsonl", ROW.encode("utf-16"), "line 1: cannot be read as"),
        ("csv", "file_name,text\na.png,a\nb.png,a cat, sitting\n", "line 3: more fields than the header"),
        ("csv", "file_name;text\na.png;a\n", "line 2: no caption column"),
        ("csv", 'file_name,text\na.png,a\nb.png,"open\n', "line 3: unexpected end of data"),
    ],
)  # fmt: skip
def test_a_mistake_in_metadata_is_found_at_once_with_its_line(tmp_path, name, text, expected):
    write(tmp_path / "a.png", encoded())
    path = write(tmp_path / f"metadata.{name}", text)
    message = why_not([tmp_path])
    assert str(path) in message and expected in message


def test_one_list_of_captions_per_folder(tmp_path):
    metadata(tmp_path)
    write(tmp_path / "metadata.csv", "file_name,text\n")
    assert "keep one" in why_not(tmp_path)


# -- shards


def test_shards_by_path_glob_range_and_list_are_one_stream(tmp_path):
    paths = [
        shard(
            tmp_path / f"train-{n:04d}.tar",
            {f"./{n}/00.jpg": encoded(format="JPEG"), f"./{n}/00.txt": f"{n}\n\nb"},
        )
        for n in range(8, 12)
    ]
    expected = {f"train-{n:04d}.tar/{n}/00": (f"{n}", "b") for n in range(8, 12)}
    for source in (
        f"{tmp_path}/train-*.tar",
        f"{tmp_path}/train-{{0008..0011}}.tar",
        tmp_path / "t*.tar",
        paths,
    ):
        usable, broken = read(source)
        assert list(usable.items()) == list(expected.items()) and not broken
        check_source(source)
    assert list(read(paths[1])[0]) == ["train-0009.tar/9/00"]
    assert list(listing._ranges("a{8..10}b{0..1}")) == [f"a{n}b{m}" for n in (8, 9, 10) for m in (0, 1)]
    assert "train-0012.tar" in why_not(f"{tmp_path}/train-{{0008..0012}}.tar")
    assert "count up" in why_not(f"{tmp_path}/train-{{0009..0008}}.tar")


def test_shard_captions_of_every_form(tmp_path):
    image = encoded()
    path = shard(tmp_path / "a.tar.gz", {
        "1.png": image, "1.caption": "\ufeffone",
        "2.PNG": image, "2.json": '{"caption": "two", "other": "zwei"}',
        "3.json": b'\xef\xbb\xbf{"captions": ["a", " ", "b"]}', "3.png": image,
        "4.seg.png": b"", "4.webp": image, "4.txt": "txt first", "4.json": '{"text": "json"}',
        "5.txt": " ", "5.png": image, "5.json": '{"text": "five"}',
        "__MACOSX/._6.png": b"x", "6.npy": b"x" * 9,
    })  # fmt: skip
    captions = {"1": ("one",), "2": ("two",), "3": ("a", "b"), "4": ("txt first",), "5": ("five",)}
    assert read(path)[0] == {f"a.tar.gz/{key}": value for key, value in captions.items()}
    broken = read(path)[1]
    assert list(broken) == ["a.tar.gz/6"] and "it has .npy" in broken["a.tar.gz/6"]
    usable, broken = read(path, caption_column="other")
    assert usable == {"a.tar.gz/2": ("zwei",)} and "other" in broken["a.tar.gz/1"]


def test_broken_samples_of_a_shard_are_named_and_skipped(tmp_path):
    image = encoded()
    path = shard(tmp_path / "a.tar", [
        ("1.png", b"garbage"), ("1.txt", "a"), ("2.png", image), ("3.txt", "a"),
        ("4.png", image), ("4.json", "{"), ("5.png", image), ("5.txt", b"caf\xe9"),
        ("6.png", b""), ("6.txt", "a"), ("7.png", image), ("7.txt", "a"), ("8.png", image), ("8.txt", "a"),
        ("7.png", image), ("7.txt", "b"), ("7.png", image), ("7.txt", "c"),
    ])  # fmt: skip
    usable, broken = read(path)
    assert usable == {"a.tar/7": ("a",), "a.tar/8": ("a",), "a.tar/7#2": ("b",), "a.tar/7#3": ("c",)}
    assert list(broken) == [f"a.tar/{n}" for n in range(1, 7)]
    words = ["not a picture", "no caption", "no picture", ".json", ".txt", "empty"]
    assert all(word in why for word, why in zip(words, broken.values(), strict=True))


@pytest.mark.parametrize("ending", sorted({*pictures.PICTURE_FILES} - {".heic", ".heif", ".avif"}))
def test_pictures_of_every_ending_are_read_beside_captions_and_in_shards(tmp_path, ending):
    kind = {".jpg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".apng": "PNG"}.get(ending)
    data = encoded(format=kind or Image.registered_extensions()[ending])
    for name, text in ((f"a{ending}", "a.txt"), (f"B{ending.upper()}", "B.TXT")):
        write(tmp_path / "folder" / name, data)
        write(tmp_path / "folder" / text, "\ufeffa\r\n")
    assert list(read(tmp_path / "folder")[0].values()) == [("a",), ("a",)]
    members = {f"a{ending}": data, "a.txt": "a", f"B{ending.upper()}": data, "B.TXT": "a"}
    assert list(read(shard(tmp_path / "a.tar", members))[0].values()) == [("a",), ("a",)]


def test_a_captioned_file_with_another_ending_is_named(tmp_path):
    for name in ("a.jxl", "b.psd", "c.png", "c.npz", "no-ending", "README.md"):
        write(tmp_path / name, encoded())
    for name in ("a", "b", "c", "no-ending", "alone"):
        write(tmp_path / f"{name}.txt", "a")
    usable, broken = read(tmp_path)
    assert list(usable) == ["c.png"] and list(broken) == ["a.jxl", "b.psd", "no-ending"]
    assert all("not the ending of a picture" in why for why in broken.values())


def test_names_with_dots_are_told_the_rule_of_the_first_dot(tmp_path):
    image = encoded()
    path = shard(tmp_path / "a.tar", [
        ("22.05.png", image), ("22.05.txt", "a"), ("22.06.png", image), ("22.06.txt", "b"),  # names of dates
        ("s.input.png", image), ("s.edited.jpg", image), ("s.txt", "a"),  # fields, and none of them alone
        ("v1.png", image), ("v1.txt", "v1"), ("v1.5.png", image), ("v1.5.txt", "v1.5"),  # a sample beside a field
        ("4.seg.png", image), ("4.png", image), ("4.txt", "4"), ("4.cls.txt", "7"),  # as WebDataset means it
        ("x.y/z.png", image), ("x.y/z.txt", "dots in a folder's name are no matter"),
    ])  # fmt: skip
    usable, broken = read(path)
    assert list(usable) == ["a.tar/v1", "a.tar/4", "a.tar/x.y/z"]
    assert list(broken) == [f"a.tar/{n}" for n in ("22.05.png", "22.06.png", "s.input.png", "s.edited.jpg", "v1.5.png")]
    assert all("a name ends at its first dot" in why for why in broken.values())
    only = shard(tmp_path / "b.tar", {"22.05.png": image, "22.05.txt": "a"})
    message = why_not(only)
    assert "b.tar/22.05.png" in message and "this is .05.png of '22'" in message and "remove the other dots" in message


def test_every_sample_of_a_shard_is_used_or_named(tmp_path):
    image = encoded()
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), type, link
            tar.addfile(info, io.BytesIO(data))

        add("folder", type=tarfile.DIRTYPE)
        add("folder/1.png", image)
        add("folder/1.txt", b"a")
        add("2.png", type=tarfile.LNKTYPE, link="folder/1.png")
        add("2.txt", type=tarfile.LNKTYPE, link="folder/1.txt")
        add("3.png", type=tarfile.SYMTYPE, link="folder/1.png")
        add("3.txt", b"a")
        add("4.mp4", b"x")
        add("abc123", image)
        add("._5.png", b"x")
        add("6.png", image)
        add("6.txt", type=tarfile.SYMTYPE, link="folder/1.txt")
    usable, broken = read(path)
    assert list(usable) == ["a.tar/folder/1"] and list(broken) == [f"a.tar/{n}" for n in ("2", "3", "4", "abc123", "6")]
    assert "it has .png (a link), .txt (a link); pack files instead of links" in broken["a.tar/2"]
    assert ".mp4" in broken["a.tar/4"] and "without an ending" in broken["a.tar/abc123"]
    assert "its .txt is a link" in broken["a.tar/6"]


@pytest.mark.parametrize("zipped", [False, True])
def test_tars_joined_by_cat_are_named(tmp_path, zipped):
    parts = [shard(tmp_path / f"{n}.tar", {f"{n}.png": encoded(), f"{n}.txt": "a"}).read_bytes() for n in range(2)]
    path = write(tmp_path / "a.tar", b"".join(gzip.compress(part) if zipped else part for part in parts))
    usable, broken = read(path)
    assert list(usable) == ["a.tar/0"] and "joined by cat" in broken["a.tar"]
    assert not read(write(tmp_path / "b.tar", gzip.compress(parts[0]) if zipped else parts[0]))[1]  # by its contents


def test_pictures_apart_from_their_captions_fail_the_check(tmp_path):
    path = shard(tmp_path / "a.tar", [("1.png", encoded()), ("2.png", encoded()), ("1.txt", "a"), ("2.txt", "b")])
    assert list(read(path)[1]) == ["a.tar/1", "a.tar/2", "a.tar/1#2", "a.tar/2#2"]
    assert "a.tar/1: no caption" in why_not(path)


def six_members() -> dict[str, bytes | str]:
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)))
    return {f"{n}.{kind}": noise if kind == "png" else "a" for n in range(3) for kind in ("png", "txt")}


@pytest.mark.parametrize(
    ("part", "samples"), [("header", 2), ("picture", 2), ("between", 2), ("end mark", 3), ("everything", 0)]
)
def test_a_shard_that_is_cut_off_is_named_after_what_it_held(tmp_path, part, samples):
    after, cut = shard(tmp_path / "next.tar", six_members()), tmp_path / "cut.tar"
    with tarfile.open(after) as tar:
        start = {member.name: member.offset for member in tar}
        at = {"header": start["2.png"] + 100, "picture": start["2.png"] + 700, "between": start["2.txt"],
              "end mark": tar.offset, "everything": 0}[part]  # fmt: skip
    write(cut, after.read_bytes()[:at])
    usable, broken = read([cut, after])
    assert set(usable) == {f"cut.tar/{n}" for n in range(samples)} | {f"next.tar/{n}" for n in range(3)}
    assert "cut off or damaged" in broken.pop("cut.tar")
    assert set(broken) == ({"cut.tar/2"} if part == "between" else set())
    check_source([cut, after])
    if part == "everything":
        assert "cut.tar" in why_not(cut)


def test_a_compressed_shard_that_is_cut_off_is_named(tmp_path):
    whole = gzip.compress(shard(tmp_path / "whole.tar", six_members()).read_bytes())
    usable, broken = read(write(tmp_path / "cut.tar.gz", whole[: len(whole) // 2]))
    assert "cut.tar.gz/0" not in broken and "cut.tar.gz/2" not in usable
    assert "cut off or damaged" in broken["cut.tar.gz"]


def test_a_broken_header_in_the_middle_is_named(tmp_path):
    path = shard(tmp_path / "a.tar", six_members())
    with tarfile.open(path) as tar:
        start = tar.getmember("1.txt").offset
    data = bytearray(path.read_bytes())
    data[start + 148 : start + 156] = b"99999999"
    path.write_bytes(data)
    usable, broken = read(path)
    assert list(usable) == ["a.tar/0"] and list(broken) == ["a.tar/1", "a.tar"]


def test_shards_of_one_name_are_told_apart(tmp_path):
    members = {"0.png": encoded(), "0.txt": "a"}
    paths = [shard(tmp_path / folder / "0.tar", members) for folder in ("x", "y")]
    assert list(read(paths)[0]) == ["x/0.tar/0", "y/0.tar/0"]
    assert "twice" in why_not([paths[0], paths[0]])


def test_a_huge_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_FILE_MIB", 0)
    monkeypatch.setattr(shards, "MAX_FILE_MIB", pictures.MAX_FILE_MIB)
    path = shard(tmp_path / "a.tar", {"0.png": encoded(), "0.txt": "a"})
    (sample,) = read_pictures(path)
    assert len(sample.open.args[1]) == 1
    with pytest.raises(BrokenPicture, match="larger than 0 MiB"):
        sample.open()


def test_memory_is_flat(tmp_path):
    mib = bytes(1 << 20)
    path = shard(tmp_path / "a.tar", [item for n in range(16) for item in ((f"{n}.png", mib), (f"{n}.txt", "a"))])
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_pictures(path)) == 16
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


# -- naming the source


def test_an_existing_path_is_not_read_as_a_pattern(tmp_path):
    folder = tmp_path / "my [best] {0..1}*"
    write(folder / "a.png", encoded())
    write(folder / "a.txt", "a")
    assert read(str(folder))[0] == {"a.png": ("a",)}


def test_sources_with_nothing_to_read_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bare/a.png", encoded())
    write(tmp_path / "broken/a.png", b"x")
    write(tmp_path / "broken/a.txt", "a")
    write(tmp_path / "a.zip", b"x")
    assert "no such file or folder" in why_not(tmp_path / "gone", read_pictures)  # already when called
    assert "no file matches" in why_not(f"{tmp_path}/*.tar", read_pictures)
    assert "list of picture sources is empty" in why_not([], read_pictures)
    assert "one folder" in why_not(tmp_path / "a.zip", read_pictures)
    assert "one folder" in why_not([tmp_path / "bare", tmp_path / "broken"], read_pictures)
    assert "no pictures here" in why_not(tmp_path / "empty")
    assert "a.png: no caption" in why_not(tmp_path / "bare")
    assert "a.png: not a picture" in why_not(tmp_path / "broken")
    assert "tags" in why_not(tmp_path / "broken", caption_column="tags")


def test_without_the_extra_one_line_names_it(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    write(tmp_path / "a.parquet", b"x")
    assert "pip install 'prunet[data]'" in why_not(tmp_path / "a.parquet", read_pictures)
    assert "owner/name: no such folder here" in why_not("owner/name", read_pictures)
    write(tmp_path / "folder/a.png", encoded())
    write(tmp_path / "folder/a.txt", "a")
    check_source(tmp_path / "folder")


# -- Parquet and the Hub


def table(path: Path, **columns: list) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet(tmp_path):
    good = {"bytes": encoded(), "path": "x.png"}
    images = [good, good, {"bytes": b"x", "path": None}, None, {"bytes": None, "path": "/etc/x.png"}]
    table(tmp_path / "b.parquet", image=[encoded()], text=["raw bytes"])
    path = table(tmp_path / "a.parquet", image=images, caption=["a", "", "c", "d", "e"], list=[["x", "y"]] * 5)
    write(tmp_path / "c.parquet", path.read_bytes()[:-9])
    usable, broken = read(f"{tmp_path}/*.parquet")
    assert usable == {"a.parquet/00000000": ("a",), "b.parquet/00000000": ("raw bytes",)}
    assert list(broken) == [*(f"a.parquet/0000000{n}" for n in range(1, 5)), "c.parquet"]
    assert read(path, caption_column="list")[0]["a.parquet/00000001"] == ("x", "y")
    assert "no picture column img; it has image, caption, list" in why_not(path, image_column="img")
    assert "no caption column what; it has" in why_not(path, caption_column="what")
    check_source(path)


def test_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    good = {"bytes": encoded(), "path": "x.png"}
    table(tmp_path / "data/train-0.parquet", image=[good, {"bytes": b"x", "path": None}], text=["a", "b"])
    load = datasets.load_dataset

    def local(name, split, streaming):
        assert (name, streaming) == ("owner/name", True)
        return load("parquet", data_files={"train": f"{tmp_path}/data/*.parquet"}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    usable, broken = read("owner/name")
    assert usable == {"owner/name/train/00000000": ("a",)} and list(broken) == ["owner/name/train/00000001"]
    assert "owner/name:test" in why_not("owner/name:test")
    assert "no picture column img" in why_not("owner/name", image_column="img")


# -- decoding


def test_exif_orientation_is_applied(tmp_path):
    image = picture("white", (8, 4))
    image.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = opened(tmp_path, encoded(image, "PNG", exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 1)) == (0, 0, 0) and upright.getpixel((2, 6)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with one transparent colour"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    if mode == "P":
        image = picture(0, mode="P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = encoded(image, transparency=0)
    elif mode.startswith("RGB "):
        data = encoded(picture("black"), transparency=(0, 0, 0))
    else:
        data = encoded(picture((0,) * (len(mode) - 1) + (0,) if mode == "LA" else (0, 0, 0, 0), mode=mode))
    assert opened(tmp_path, data).getpixel((1, 1)) == (255, 255, 255)


def test_half_transparent_black_is_grey(tmp_path):
    assert opened(tmp_path, encoded(picture((0, 0, 0, 128), mode="RGBA"))).getpixel((1, 1)) == (127,) * 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, format):
    image = Image.fromarray(np.full((4, 6), 128 * 257, np.uint16))
    assert opened(tmp_path, encoded(image, format)).getpixel((1, 1)) == (128, 128, 128)


def test_float_pixels_are_refused_by_name(tmp_path):
    with pytest.raises(BrokenPicture, match="float or 32-bit"):
        opened(tmp_path, encoded(picture(0.5, mode="F"), "TIFF"), "a.tif")


def test_cmyk_grey_bilevel_and_first_frames(tmp_path):
    red, green, blue = opened(tmp_path, encoded(picture((0, 255, 255, 0), mode="CMYK"), "JPEG")).getpixel((1, 1))
    assert red > 200 and green < 60 and blue < 60
    assert opened(tmp_path, encoded(picture(77, mode="L"))).getpixel((1, 1)) == (77, 77, 77)
    assert opened(tmp_path, encoded(picture(1, mode="1"))).getpixel((1, 1)) == (255, 255, 255)
    for format in ("GIF", "WEBP"):
        frames = {"save_all": True, "append_images": [picture("blue")], "lossless": True}
        assert opened(tmp_path, encoded(picture("red"), format, **frames)).getpixel((1, 1)) == (255, 0, 0)


def test_a_decompression_bomb_is_a_broken_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenPicture, match="exceeds limit"):
        opened(tmp_path, encoded(picture(size=(50, 50))))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def texts(kind: str) -> bytes:
    """Chunks beyond Pillow's limits for texts, or with a wrong checksum."""
    large = zlib.compress(bytes(2 << 20))
    return {
        "compressed text": lambda: chunk(b"zTXt", b"note\0\0" + large),
        "international text": lambda: chunk(b"iTXt", b"note\0\1\0\0\0" + large),
        "profile": lambda: chunk(b"iCCP", b"icc\0\0" + large),
        "many texts": lambda: chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(900_000))) * 80,
        "wrong checksum": lambda: chunk(b"tEXt", b"note\0abc")[:-4] + b"abcd",
        "large XMP": lambda: chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + large),
    }[kind]()


KINDS = ("compressed text", "international text", "profile", "many texts", "wrong checksum", "large XMP")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["before the pixels", "after them"])
def test_texts_and_profiles_beyond_pillows_limits_cost_no_picture(tmp_path, kind, place):
    png = encoded(gradient(40, 30))
    at = 33 if place == "before the pixels" else len(png) - 12
    whole = png[:at] + texts(kind) + png[at:]
    assert np.array_equal(opened(tmp_path / "a", whole), gradient(40, 30))
    (sample,) = read_pictures(shard(tmp_path / "a.tar", {"a.png": whole, "a.txt": "a"}))
    assert np.array_equal(sample.open(), gradient(40, 30))
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 255
    for data in (png[:33] + texts(kind) + png[33:-40], bytes(damaged[:33]) + texts(kind) + bytes(damaged[33:])):
        with pytest.raises(BrokenPicture):  # nothing else is forgiven
            opened(tmp_path / "b", data)


@pytest.mark.parametrize("by", ["exif", "xmp"])
def test_beside_large_texts_a_picture_is_still_turned(tmp_path, by):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    png = encoded(gradient(40, 30), exif=exif) if by == "exif" else encoded(gradient(40, 30))
    turning = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) if by == "xmp" else b""
    upright = opened(tmp_path, png[:33] + turning + texts("compressed text") + png[33:])
    assert upright.size == (30, 40)


def odd_pictures(name: str) -> bytes:
    """Those of which Pillow warns."""
    if name == "large":
        return encoded(Image.new("1", (10_000, 9_000)))
    if name == "palette":
        return encoded(gradient(16, 16).convert("P"), transparency=bytes(range(200)))
    jpeg, broken_exif = encoded(format="JPEG"), b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 20
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(broken_exif) + 2) + broken_exif + jpeg[2:]


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate"])
def test_messages_of_libtiff_do_not_reach_the_user(tmp_path, capfd, compression):
    data = bytearray(encoded(gradient(64, 64), "TIFF", compression=compression))
    data[200:260] = b"\xff" * 60
    with pytest.raises(BrokenPicture, match="decoder error"):
        opened(tmp_path, bytes(data), "a.tif")
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


@pytest.mark.parametrize("name", ["large", "palette", "exif"])
def test_no_warning_of_pillow_reaches_the_user(tmp_path, capfd, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened(tmp_path, odd_pictures(name))
        assert warnings.filters[0][0] == "always", "the filters of the caller stay"
    logger = logging.getLogger("PIL.TiffImagePlugin")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("PIL").handlers)
    assert logger.propagate and not caught and capfd.readouterr() == ("", "")


def test_transparent_16_bit_grey_is_white(tmp_path):
    image = Image.fromarray(np.array([[300, 40_000]], np.uint16))
    seen = opened(tmp_path, encoded(image, transparency=300))
    assert seen.getpixel((0, 0)) == (255,) * 3 and seen.getpixel((1, 0)) == (156,) * 3


# -- fit


def gradient(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


def by_the_book(image: Image.Image, size: int, top: int, left: int, flipped: bool) -> torch.Tensor:
    """Resize the whole, flip it, crop it: as torchvision does, without it."""
    short = min(image.size)
    whole = image.resize([side * size // short for side in image.size], Image.Resampling.BILINEAR)
    whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else whole
    crop = whole.crop((left, top, left + size, top + size))
    return torch.tensor(np.array(crop)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(("width", "height", "size"), [(50, 31, 16), (31, 50, 16), (20, 20, 33), (97, 13, 40)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_fit_equals_resize_flip_crop(width, height, size, crop):
    image = gradient(width, height)
    seen = set()
    for seed in range(6):
        fitted = fit(image, size, crop=crop, flip=True, seed=seed)
        expected = by_the_book(image, size, *fitted.crop_top_left, fitted.flipped)
        assert fitted.pixels.shape == (3, size, size) and fitted.pixels.dtype == torch.float32
        assert (fitted.pixels - expected).abs().max() <= 2 / 255 * 1.01  # one grey level of rounding
        assert fitted.original_size == (height, width) and fitted.pixels.is_contiguous()
        seen.add((fitted.crop_top_left, fitted.flipped))
    assert len(seen) > 1


def test_fit_of_the_native_size_changes_no_pixel():
    image = gradient(24, 16)
    fitted = fit(image, (16, 24))
    assert torch.equal(fitted.pixels, torch.tensor(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
    assert fitted.crop_top_left == (0, 0) and not fitted.flipped
    assert fit(picture("white"), 4).pixels.max() == 1 and fit(picture("black"), 4).pixels.min() == -1


def test_fit_center_crop_has_the_coordinates_of_torchvision():
    assert fit(gradient(50, 31), 16).crop_top_left == (0, round((50 * 16 // 31 - 16) / 2))
    assert fit(gradient(30, 60), (16, 8)).crop_top_left == (0, 0)
    assert fit(gradient(60, 60), (8, 16)).crop_top_left == (4, 0)
    assert fit(gradient(60, 60), (8, 16)).pixels.shape == (3, 8, 16)


def test_fit_depends_on_its_arguments_alone():
    image = gradient(60, 20)
    before = image.tobytes()
    fits = [fit(image, 16, crop="random", flip=True, seed=seed) for seed in range(-100, 100)]
    again = fit(image, 16, crop="random", flip=True, seed=-7)
    assert torch.equal(again.pixels, fits[93].pixels) and image.tobytes() == before
    assert 60 < sum(fitted.flipped for fitted in fits) < 140
    lefts = [fitted.crop_top_left[1] for fitted in fits]
    assert min(lefts) == 0 and max(lefts) == 32 and len(set(lefts)) > 20  # both ends can be reached
    assert lefts == [fit(image, 16, crop="random", seed=seed).crop_top_left[1] for seed in range(-100, 100)]
    assert lefts[1:100] != lefts[:100:-1]  # a seed and its negative differ


def test_fit_of_a_thin_strip_needs_no_huge_picture():
    fitted = fit(gradient(1, 30_000), 512, crop="random", seed=1)
    assert fitted.pixels.shape == (3, 512, 512) and 0 <= fitted.crop_top_left[0] <= 30_000 * 512 - 512


def test_fit_refuses_what_it_does_not_know():
    for size, crop in ((0, "center"), ((8, 0), "center"), (8, "middle")):
        with pytest.raises(UserError, match=r"fit\("):
            fit(picture(), size, crop=crop)


def test_csv_written_by_the_standard_library_is_read_back(tmp_path):
    write(tmp_path / "a.png", encoded())
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), ("a.png", 'a "quoted", 猫')])
    assert read(tmp_path)[0] == {"a.png": ('a "quoted", 猫',)}
