"""The page with models side by side: what they draw, what is refused, and the page in a real browser."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from browser import CHROMIUM, Page
from PIL import Image
from test_adapters import other_model, write_lora
from test_cli import call

from prunet import UserError, adapt, generate
from prunet.play import page as page_file
from prunet.play.models import Asked, Player, open_players
from prunet.recipe.values import Drawing
from prunet.sampling.draw import open_model
from prunet.sampling.start import StartPicture

HOW = Drawing(steps=2, guidance_scale=2.0, sampler="ddim")
ASKED = {"prompt": "a cat", "seed": 4, "size": 16, "drawing": HOW}
CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def players(finished: Path) -> list[Player]:
    return open_players([str(finished)], **CPU)


def test_a_run_is_its_teacher_and_its_student_at_equal_noise(players, finished, sd) -> None:
    assert [player.name for player in players] == ["teacher", "student"]
    drawn = [player.draw(Asked(**ASKED)) for player in players]
    for one, model in zip(drawn, (sd, finished), strict=True):
        assert one.picture.tobytes() == generate(model, "a cat", drawing=HOW, seed=4)[0].tobytes()
        assert one.seconds > 0 and one.drawing == HOW
        weights = sum(p.nbytes for p in open_model(model).unet.parameters()) / 2**20
        assert one.peak_memory_mb is None or one.peak_memory_mb > weights


@pytest.mark.parametrize("masked", [False, True])
def test_from_a_picture(masked, players, finished, sd) -> None:
    picture, mask = Image.new("RGB", (20, 16), "red"), Image.new("L", (20, 16))
    mask.paste(255, (10, 0, 20, 16))
    start = StartPicture(picture, 0.5, mask if masked else None)
    for player, model in zip(players, (sd, finished), strict=True):
        drawn = player.draw(Asked(**ASKED, start=start)).picture
        expected = generate(model, "a cat", drawing=HOW, start=start, seed=4)[0]
        assert drawn.tobytes() == expected.tobytes()


def test_a_lora_is_the_teachers_and_is_carried_over_to_the_student(players, finished, tmp_path) -> None:
    """It draws as stock diffusers does with the file that `adapt` writes; without the file it draws as before."""
    lora, _ = write_lora(tmp_path / "lora.safetensors", "sd", "peft")
    before = [player.draw(Asked(**ASKED)).picture.tobytes() for player in players]
    with_it = [player.draw(Asked(**ASKED, lora=lora)).picture.tobytes() for player in players]
    for player, file in zip(players, (lora, Path(adapt(lora, finished)["output"])), strict=True):
        fresh = open_players([str(player.opened.source)], **CPU)[0]
        fresh.pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        expected = fresh.draw(Asked(**ASKED)).picture.tobytes()
        assert with_it[players.index(player)] == expected != before[players.index(player)]
    assert [player.draw(Asked(**ASKED)).picture.tobytes() for player in players] == before


def test_a_lora_of_another_model_is_refused_by_both(players, tmp_path) -> None:
    other = other_model(tmp_path / "other.safetensors")
    for player in players:
        before = player.draw(Asked(**ASKED)).picture.tobytes()
        with pytest.raises(UserError, match=r"give a LoRA that was made for"):
            player.draw(Asked(**ASKED, lora=other))
        assert player.draw(Asked(**ASKED)).picture.tobytes() == before


def test_two_models_and_their_names(finished, sd, sdxl) -> None:
    assert [p.name for p in open_players([str(sd), str(finished)], **CPU)] == ["sd", "run"]
    assert [p.name for p in open_players([str(sd)], **CPU)] == ["sd"]
    with pytest.raises(UserError, match="is given twice"):
        open_players([str(sd), str(sd)], **CPU)


def test_the_server_bounds_what_it_is_asked_for(players, tmp_path) -> None:
    """Requests need not come from the page's controls."""
    answer = page_file._answer(SimpleNamespace(Error=lambda text, **_: RuntimeError(text)), players)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    Image.new("L", (16, 12), 255).save(tmp_path / "flat.png")
    good = ["a cat", 4, 2, 2.0, "ddim", None, None, 0.6, None]
    shown = answer(*good)
    assert isinstance(shown[0], Image.Image) and re.search(r"\d s", shown[1]) and "differ by" in shown[-1]
    for place, value, message in (
        (0, "\udcff", "prompt"),
        (2, 10**9, "steps up to 100"),
        (3, 1e9, "guidance up to 30"),
        (4, "best", "a sampler of the list"),
        (5, str(text), "picture .*not a picture"),
        (6, str(tmp_path / "flat.png"), "mask: needs a picture"),
        (8, str(text), "text.png"),
    ):
        wrong = [value if i == place else old for i, old in enumerate(good)]
        with pytest.raises(RuntimeError, match=message):
            answer(*wrong)
    good[5] = str(tmp_path / "black.png")
    for mask, message in (("text", "mask .*not a picture"), ("flat", "mask: has 16 x 12 px"), ("black", "no white")):
        with pytest.raises(RuntimeError, match=message):
            answer(*good[:6], str(tmp_path / f"{mask}.png"), *good[7:])


def test_without_gradio_the_verb_says_what_to_install(capsys, monkeypatch, finished) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = call(capsys, "play", finished, "--device", "cpu")
    assert (code, err) == (2, "error: prunet play: needs Gradio: pip install 'prunet[ui]'\n")


def test_mistakes_of_the_verb_are_one_line(capsys, finished, tmp_path) -> None:
    pytest.importorskip("gradio")
    for args, message in (
        ((tmp_path / "nowhere",), "nowhere"),
        ((finished, finished), "is given twice"),
        ((finished, "--host", "203.0.113.7", "--port", 7999), "cannot listen at 203.0.113.7:7999"),
    ):
        code, _, err = call(capsys, "play", *args, "--device", "cpu")
        assert (code, len(err.splitlines())) == (2, 1) and message in err, err


@pytest.fixture(scope="module")
def served(finished: Path, tmp_path_factory) -> Any:
    """Starts the command in a new process; yields its address and the process."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "prunet", "play", str(finished), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    yield process.stdout.readline().split()[0], process
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_in_a_browser_by_keyboard(served, width: int, tmp_path: Path) -> None:
    url, process = served
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    lora, _ = write_lora(tmp_path / "lora.safetensors", "sd", "peft")
    for name in ("red", "white"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    page = Page(url, tmp_path, width)
    try:
        page.wait("document.querySelector('#prompt :focus')")  # it has the focus from the start
        page.type("a cat")
        page.press("Enter")
        page.wait("document.querySelectorAll('.pictures img').length == 2")
        first = drawn(page)
        page.tab_to("document.activeElement.innerText.startsWith('Steps, guidance')")
        page.press("Enter")
        page.wait("document.querySelector('input[type=file][accept*=image]')")
        for name in ("number input for Steps", "range slider for Guidance scale"):
            page.tab_to(f"document.activeElement.ariaLabel == {name!r}")
        page.upload("input[type=file][accept*=image]", tmp_path / "red.png")
        page.wait("document.querySelector('img[src*=red]')")
        page.upload("input[type=file][accept*=image]", tmp_path / "white.png")  # of the mask: the picture's is gone
        page.upload("input[type=file][accept*=safetensors]", lora)
        page.wait("document.querySelector('img[src*=white]') && document.body.innerText.includes('lora')")
        page.tab_to("document.activeElement.id == 'draw'", back=True)
        page.press(" ")
        page.wait(f"JSON.stringify({SOURCES}) != {first!r}")
        assert re.search(r"differ by 0\.\d+", page.do("document.querySelector('#distance').innerText"))
        page.wait("(document.querySelector('.pictures').innerText.match(/25 steps, guidance 7.5/g) || []).length == 2")
        took = page.do("document.querySelector('.pictures').innerText")
        assert len(re.findall(r"\d s\b", took)) == 2, took
        boxes = page.do("[...document.querySelectorAll('.pictures img')].map(e => e.getBoundingClientRect().toJSON())")
        assert boxes[0]["top"] == boxes[1]["top"] and boxes[0]["right"] <= boxes[1]["left"]  # side by side
        assert page.do("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert {urlsplit(request).hostname for request in page.requests if "://" in request} == {"127.0.0.1"}
        assert not page.errors
    finally:
        page.close()


SOURCES = "[...document.querySelectorAll('.pictures img')].map(e => e.src)"


def drawn(page: Page) -> str:
    return page.do(f"JSON.stringify({SOURCES})")
