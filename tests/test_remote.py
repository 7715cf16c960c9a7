"""Data behind URLs: whatever the network does, the cache equals that of local files, or an error is one line."""

import hashlib
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache as memo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prunet import Run, Runtime, Teacher, UserError, cache, load_recipe
from prunet.data import encoding, remote
from prunet.data.contents import source_fingerprint
from prunet.data.sources import read_pictures
from prunet.recipe.recipe import Data, Recipe
from prunet.runs.estimate import count_samples

pytest.importorskip("aiohttp")


class Server(BaseHTTPRequestHandler):
    """Serves the files of `folder`; two of three requests are handled by `fault`."""

    protocol_version = "HTTP/1.1"
    folder: Path
    fault = ""
    requests: list[str]  # names of the files that were asked for

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body, fault = path.read_bytes(), self.fault
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if fault != "no parts" else None
        part = body[int(asked[1]) : int(asked[2]) + 1] if asked else body
        if self.command == "GET":
            self.requests.append(path.name)
            fault = fault if len(self.requests) % 3 else ""
        else:
            fault = ""
        if fault == "busy":
            self.send_response(429 if len(self.requests) % 2 else 503)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "wrong length":
            part = part[: len(part) // 2]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", hashlib.sha1(body).hexdigest())
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "dropped":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        for at in range(0, len(part), 4096):
            self.wfile.write(part[at : at + 4096])
            self.wfile.flush()
            time.sleep(0.005 if fault == "slow" else 0)
        return None


@pytest.fixture
def served(shards, monkeypatch) -> Iterator[tuple[type[Server], str]]:
    """A server of the shards and its address; clients retry without a pause."""
    handler = type("Bound", (Server,), {"folder": shards, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "WAITS_S", (0, 0, 0))
    monkeypatch.setattr(remote, "BLOCK", 16384)  # several requests a shard
    monkeypatch.setattr(encoding, "BLOCK", 4)
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pictures) -> Path:
    """Three shards of four samples, larger than a request, and a Parquet file of the same."""
    import pyarrow
    import pyarrow.parquet

    folder, rows = tmp_path_factory.mktemp("shards"), []
    for number in range(3):
        with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
            for sample in range(4 * number, 4 * number + 4):
                for path in (pictures / f"{sample:03d}.png", _caption(folder, sample)):
                    tar.add(path, path.name)
                padding = folder / "padding.bin"
                padding.write_bytes(hashlib.shake_256(bytes([sample])).digest(9000))
                tar.add(padding, f"{sample:03d}.bin")
                rows.append({"image": (pictures / f"{sample:03d}.png").read_bytes(), "text": f"picture {sample}"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=4)
    return folder


def _caption(folder: Path, sample: int) -> Path:
    (path := folder / f"{sample:03d}.txt").write_text(f"picture {sample}")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json")}


@pytest.fixture(scope="module")
def local(sd, shards, tmp_path_factory) -> Callable[[str], Path]:
    """Returns the cache of local files, made when a test first asks for it, with what the test patches."""

    @memo
    def made(name: str) -> Path:
        return cache(Teacher(sd), Data(source=f"{shards}/{name}"), tmp_path_factory.mktemp("local") / "cache").folder

    return made


@pytest.mark.parametrize("fault", ["", "dropped", "slow", "wrong length", "no parts", "busy"])
@pytest.mark.parametrize("name", ["train-{0..2}.tar", "rows.parquet"])
def test_the_cache_of_a_bad_network_is_that_of_local_files(
    sd, served, local, tmp_path, monkeypatch, name, fault
) -> None:
    server, address = served
    server.fault = fault
    monkeypatch.setattr(
        encoding, "source_fingerprint", lambda *_: "the same"
    )  # because it is part of every block's label
    made = cache(Teacher(sd), Data(source=f"{address}/{name}"), tmp_path / "remote")
    assert len(made) == 12
    assert server.requests
    near, far = files(local(name)), files(tmp_path / "remote")
    for found in (near, far):
        found.pop("cache.json"), found.pop("source.json", None), found.pop(".prunet.json", None)  # name the source
    assert far == near


def test_a_cache_that_resumes_reads_no_shard_again_whose_samples_it_has(sd, served, tmp_path, monkeypatch) -> None:
    server, address = served
    data, folder = Data(source=f"{address}/train-{{0..2}}.tar"), tmp_path / "c"
    cache(Teacher(sd), data, folder)
    whole = files(folder)
    for name in ("cache.json", "shard-00002.safetensors"):
        (folder / name).unlink()
    monkeypatch.setattr(encoding, "check_source", lambda *_, **__: None)  # it looks into the first
    server.requests.clear()
    assert len(cache(Teacher(sd), data, folder)) == 12
    assert files(folder) == whole
    assert set(server.requests) == {"train-2.tar"}


def test_contents_decide_whether_a_url_is_the_same_and_a_finished_cache_needs_no_network(sd, served, tmp_path) -> None:
    server, address = served
    source = f"{address}/train-1.tar"
    before = source_fingerprint(source)
    cache(Teacher(sd), Data(source=source), tmp_path / "c")
    path = server.folder / "train-1.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"picture 5", b"picture 8"))
    remote._facts.cache_clear()
    assert source_fingerprint(source) != before
    path.rename(aside := path.with_suffix(".aside"))
    remote._facts.cache_clear()
    assert len(cache(Teacher(sd), Data(source=source), tmp_path / "c")) == 4
    aside.unlink()
    path.write_bytes(whole)


def test_how_many_samples_there_are_is_told_from_the_first_shard_and_the_sizes_of_all(sd, served) -> None:
    _, address = served
    data = {"source": f"{address}/train-{{0..2}}.tar"}
    recipe = {"teacher": str(sd), "plan": "bk-small", "data": data, "stages": [{"steps": 1, "batch_size": 2}]}
    recipe |= {"evaluation": {"prompts": ["a"]}, "output": "nowhere"}
    assert count_samples(Run(Recipe.model_validate(recipe), Runtime(device="cpu"))) == (12, "about")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/nothing.tar", r"nothing\.tar: cannot be read \(404\): check the address"),
        ("{}/train-1.tar?signature=secret", None),
        ("http://127.0.0.1:9/a.tar", r"a\.tar: cannot be read .*the same command resumes"),
        ("nowhere://bucket/a.tar", "nowhere://bucket/a.tar: Protocol not known.*copy the files"),
        ("{}/folder", "pictures come from one folder, or from .tar shards, or from .parquet files"),
    ],
)
def test_unreadable_data_are_one_line(served, source, message) -> None:
    source = source.format(served[1])
    if message is None:
        assert [picture.key for picture in read_pictures(source)] == [f"train-1.tar/{i:03d}" for i in range(4, 8)]
        served[0].fault = "busy"
        source, message = source.replace("-1", "-2"), r"train-2\.tar: cannot be read \((429|503)\)"
        remote._facts.cache_clear()
        served[0].requests = type("Never", (list,), {"__len__": lambda _: 1})()
    with pytest.raises(UserError, match=message) as error:
        list(read_pictures(source))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch) -> None:
    import fsspec

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"s3://b/a\.tar: s3:// needs another package: Install s3fs"):
        list(read_pictures("s3://b/a.tar"))


def test_a_url_in_a_recipe_belongs_to_no_folder(sd, tmp_path) -> None:
    text = f"teacher: {sd}\nplan: bk-small\ndata: {{source: [s3://b/a.tar, hf://datasets/o/n/b.tar]}}\n"
    text += "stages: [{steps: 1}]\nevaluation: {prompts: [a]}\noutput: run\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "sub" / "recipe.yaml")
    assert recipe.data.source == ["s3://b/a.tar", "hf://datasets/o/n/b.tar"]
    assert recipe.model_dump(context="full")["data"]["source"] == recipe.data.source
