"""Bad names, links, texts and archives end in one line, within seconds and in little memory."""

import gzip
import inspect
import json
import os
import sys
import tarfile
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pictures import encoded, metadata, read, shard, why_not, write

from prunet import Teacher, cache, console
from prunet.cli import main
from prunet.data import captions, listing
from prunet.data.contents import source_files
from prunet.data.sources import check_source, read_pictures
from prunet.errors import UserError, printable
from prunet.recipe.recipe import Data


@pytest.fixture(autouse=True)
def quick():
    """Fails each test of this file that takes 5 seconds."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 5


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def captioned(folder: Path, name: str = "a") -> Path:
    write(folder / f"{name}.png", encoded())
    write(folder / f"{name}.txt", name)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "{0..99999}{0..99999}.tar",
        "{0..9}" * 12,
        "a{0..9999999999999999999999}.tar",
        "{1.." + "9" * 5000 + "}.tar",
        "{" + "9" * 5000 + ".." + "9" * 5000 + "}",
        "x/{5..4}{0..3}.tar",
    ],
)
def test_huge_ranges_are_refused(tmp_path, name):
    message = why_not(f"{tmp_path}/{name}", read_pictures)
    assert "the range must count up, over at most 100,000 files" in message and len(message) < 600


def test_the_widest_range_stops_at_the_first_missing_file(tmp_path):
    shard(tmp_path / "00000.tar", {"a.png": encoded(), "a.txt": "a"})
    message = why_not([f"{tmp_path}/{{00000..99999}}.tar"] * 1000, read_pictures)
    assert "00001.tar: no such file" in message


@pytest.mark.parametrize("name", ["*" * 5000, "[" * 5000, "?" * 300, "a\0*", "a\0b", "x" * 5000, "**", "**/**/*.tar"])
def test_odd_names_are_refused_in_a_line(tmp_path, name):
    assert len(why_not(f"{tmp_path}/{name}")) < 900


def ring(root: Path, folders: int = 8) -> Path:
    """Folders that each link to all of them: without a bound there are 8! paths through them, and endless patterns."""
    for n in range(folders):
        captioned(root / f"{n}", f"{n}")
        for m in range(folders):
            (root / f"{n}" / f"to-{m}").symlink_to(root / f"{m}")
    return root


@pytest.mark.parametrize("pattern", ["**/*.tar", "*/" * 20 + "*.tar", "**/**/**/*.tar", "*/**/*/*.tar"])
def test_patterns_over_circular_links_are_refused(tmp_path, pattern):
    message = why_not(f"{ring(tmp_path / 'ring')}/{pattern}", read_pictures)
    assert "more than 100,000" in message or "more than 1,000 times" in message


def test_a_folder_of_circular_links_is_refused_and_a_few_links_are_read(tmp_path):
    root = ring(tmp_path / "ring")
    for call in (read_pictures, source_files, check_source):
        assert "links in it lead to the same folders more than 1,000 times" in why_not(
            root, lambda *args, call=call: list(call(*args) or ())
        )
    few = ring(tmp_path / "few", 2)
    (few / "self").symlink_to("self")
    keys = ["0/0.png", "0/to-1/1.png", "1/1.png", "1/to-0/0.png"]
    assert list(read(few)[0]) == keys
    assert [name for name, _ in source_files(few) if name.endswith(".png")] == sorted(keys)


def test_links_that_multiply_are_refused(tmp_path):
    """There is no circle, but there are 2^20 paths to the last folder."""
    for n in range(20):
        for link in "ab":
            (tmp_path / f"{n}").mkdir(exist_ok=True)
            (tmp_path / f"{n}" / link).symlink_to(tmp_path / f"{n + 1}")
    captioned(tmp_path / "20")
    assert "more than 1,000 times" in why_not(tmp_path / "0", lambda source: list(read_pictures(source)))
    assert read(tmp_path / "18")[0].keys() == {"a/a/a.png", "a/b/a.png", "b/a/a.png", "b/b/a.png"}


def test_shards_behind_a_link_are_found_by_a_pattern(tmp_path):
    shard(tmp_path / "real/deep/a.tar", {"a.png": encoded(), "a.txt": "a"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    for pattern in ("**/*.tar", "*/d*/a.tar", "**/deep/[a-b].tar", "link/**/a.tar"):
        assert [str(path) for path in listing.source_paths(f"{tmp_path}/data/{pattern}")] == [
            f"{tmp_path}/data/link/deep/a.tar"
        ]


def test_folders_are_not_walked_by_recursion(tmp_path):
    deep = captioned(tmp_path / ("d/" * 300))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        keys = [picture.key for picture in read_pictures(tmp_path)]
    finally:
        sys.setrecursionlimit(limit)
    assert keys == [f"{deep.relative_to(tmp_path)}/a.png"]


DEEP = [
    "[" * 1_000_000,
    '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"a":' * 100_000,
    '{"text": ' + "9" * 100_000 + "}",
    '{"text": "' + "x" * (5 << 20) + '"}',
    "[" + "[]," * (2 << 20) + "[]]",
]


@pytest.mark.parametrize("number", range(len(DEEP)))
def test_nested_and_wide_json_has_no_caption(tmp_path, number):
    path = shard(tmp_path / "a.tar", {"a.png": encoded(), "a.json": DEEP[number]})
    with little_memory():
        why = read(path)[1]["a.tar/a"]
    assert len(why) < 300 and ("no caption" in why)
    write(tmp_path / "folder/a.png", encoded())
    write(tmp_path / "folder/metadata.jsonl", DEEP[number])
    with little_memory():
        message = why_not(tmp_path / "folder")
    assert "metadata.jsonl, line 1" in message and len(message) < 500


def test_texts_beyond_the_bound_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "MAX_TEXT", 1 << 20)
    text = "x" * (1 << 20) + "\n"
    write(tmp_path / "folder/a.png", encoded())
    write(tmp_path / "folder/a.txt", text)
    assert "larger than 1 MiB" in read(tmp_path / "folder")[1]["a.png"]
    for name, whole in (
        ("metadata.jsonl", f'{{"text": "{text.strip()}"}}'),
        ("metadata.csv", f"file_name,text\n{text}"),
    ):
        folder = tmp_path / name
        write(folder / "a.png", encoded())
        write(folder / name, whole)
        assert "longer than 1 MiB" in why_not(folder)


def test_the_caption_is_the_first_words_of_megabytes_of_text(tmp_path):
    write(tmp_path / "a.png", encoded())
    write(tmp_path / "a.txt", "a " + " " * (1 << 20) + "word " * (1 << 19))
    ((caption,),) = read(tmp_path)[0].values()
    assert caption.startswith("a word word") and 9_000 < len(caption) <= 10_000


def test_an_unclosed_quote_does_not_read_the_whole_list_as_one_caption(tmp_path):
    rows = "".join(f"{n}.png,caption\n" for n in range(100_000))
    write(tmp_path / "metadata.csv", 'file_name,text\na.png,"open\n' + rows)
    assert "field larger than field limit" in why_not(tmp_path)


def bomb(path: Path, kind: bytes) -> Path:
    """A compressed tar with a gigabyte of zeros as a member's name."""
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 1 << 30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(1 << 20))
    return path


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_a_gigabyte_is_not_read(tmp_path, kind):
    path = bomb(tmp_path / "a.tar.gz", kind)
    with little_memory():
        ((key, why),) = read(path)[1].items()
    assert key == "a.tar.gz" and "header of 1,073,741,824 bytes" in why


def test_dotted_neighbours_are_named_without_their_bytes(tmp_path):
    path = shard(tmp_path / "a.tar", [(f"v1.{n}.png", bytes(1 << 20)) for n in range(300)])
    with little_memory():
        broken = [sample.key for sample in read_pictures(path) if not sample.captions]
    assert broken == [f"a.tar/v1.{n}.png" for n in range(300)]


@pytest.mark.parametrize("make", [lambda folder: folder / "a.tar", lambda folder: folder / "a.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, make):
    os.mkfifo(make(tmp_path))
    assert "not a file" in why_not(make(tmp_path))
    os.mkfifo(tmp_path / "metadata.jsonl")
    assert "not a file" in why_not(tmp_path)


# -- control characters of names

EVIL = "a\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202egnp"


def is_safe(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


def test_control_characters_become_escapes():
    assert is_safe(printable(EVIL)) and "\\x1b[31m" in printable(EVIL)
    assert printable("日本 \u200d👩‍🚀 a\tb\nc\\x1b") == "日本 \u200d👩‍🚀 a\tb\nc\\x1b"
    assert is_safe(str(UserError(f"{EVIL}: bad")))


def test_messages_show_no_control_character(capsys):
    console.say(f"[yellow]skipped[/] {EVIL}")
    shown = capsys.readouterr().err
    assert is_safe(shown) and "skipped a\\x1b]0;owned" in shown


def evil_source(folder: Path, form: str) -> Path:
    """Unusable data, with that name in the first place of a message where it can appear."""
    if form == "folder":
        write(folder / f"data/{EVIL}.png", b"x")
        write(folder / f"data/{EVIL}.txt", "a")
    elif form == "list":
        metadata(folder / "data", {"file_name": f"{EVIL}.png", EVIL: "a"})
    elif form == "shard":
        return shard(folder / "data", {f"{EVIL}.png": "x", f"{EVIL}.txt": "a"}).rename(folder / "data.tar")
    elif form == "pattern":
        return folder / f"{EVIL}*"
    return folder / "data"


@pytest.mark.parametrize("form", ["folder", "list", "shard", "pattern"])
def test_no_control_character_of_a_name_reaches_the_terminal(sd, tmp_path, capsys, monkeypatch, form):
    source = evil_source(tmp_path, form)
    recipe = {"teacher": str(sd), "plan": "bk-tiny", "data": {"source": str(source)}, "stages": [{"steps": 1}]}
    recipe |= {"evaluation": {"prompts": ["a"]}, "output": str(tmp_path / "out")}
    path = write(tmp_path / "recipe.yaml", json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["prunet", "cache", str(path)])
    with pytest.raises(SystemExit) as error:
        main()
    shown = capsys.readouterr()
    assert error.value.code == 2 and is_safe(shown.err + shown.out) and "\\x1b]0;owned\\x07" in shown.err


def test_pictures_skipped_are_listed_without_control_characters(sd, tmp_path, capsys):
    evil_source(tmp_path, "folder")
    cache(Teacher(sd), Data(source=str(captioned(tmp_path / "data"))), tmp_path / "cache")
    shown = capsys.readouterr().err
    assert is_safe(shown) and "1 pictures skipped" in shown and "\\x1b]0;owned" in shown
