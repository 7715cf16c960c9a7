"""The model card shows a user's text as plain text, never as Markdown or as other keys."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from test_cli import call

from prunet import Teacher
from prunet.errors import printable
from prunet.exports.card import model_card, origin
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.runs.card import loads_in
from prunet.teacher.known import layout_config

NASTY = [
    "mit\nmalicious: true",
    "openrail++ # not a comment: [x",
    "---\n# Heading\n",
    "`a` ``b`` | c | <script>alert(1)</script>",
    "```\n\n# out of the fence\n",
    '"); import os; os.system("ls") #',
    "a\\",
    "'single' \"double\" 🐈‍⬛ é \x1b[2J \x85 \u2028 \ufeff",
    "{{ 7 * 7 }} {% raw %}",
    "[a link](javascript:x) ![a picture](x) **bold** _x_ ~~y~~ $z$ &amp; <b>",
    "*" * 50,
]
SIZES = {"parameters": 10, "macs": 10}


def card(text: str) -> str:
    losses = {"task": 1, "output": 1, "feature": 1, "level": "block", "normalize": False}
    stage = {
        "steps": 1,
        "batch_size": 1,
        "learning_rate": 1,
        "schedule": "constant",
        "losses": losses,
        "ema_decay": None,
    }
    return model_card(
        {
            "teacher": text,
            "base_model": text,
            "license": text,
            "plan": {"name": text, "remove": [text]},
            "recipe": {"stages": [stage], "seed": 1},
            "data": text,
            "size": 8,
            "sizes": {"teacher": SIZES, "student": SIZES},
            "prompt": text,
        }
    )


def runtime_card(form: str, **more: Any) -> str:
    facts = {"teacher": "t", "decoder": "AutoencoderKL", "size": 8, "step": 8, "models": {}, "bits": None, "bytes": 1}
    facts |= {"psnr": 1, "picture": 1, "prompts": 1, "prompt": "a", "drawing": Drawing()}
    return model_card({**facts, "template": f"{form}.md.j2", **more})


@pytest.mark.parametrize("text", [*NASTY, "for $5 `id` $(id)"])
def test_a_prompt_is_one_argument_of_the_shell(text: str) -> None:
    line = next(line for line in runtime_card("onnx", prompt=text).splitlines() if line.startswith("    python draw"))
    _, script, _, prompt, picture = shlex.split(line)
    assert (script, prompt, picture) == ("draw_onnx.py", printable(" ".join(text.split())), "picture.png")


def test_a_model_that_takes_the_guidance_scale_is_not_called_one_without_guidance() -> None:
    plain, embedded = Drawing(steps=2, guidance_scale=1), EmbeddedGuidance(steps=2, guidance_range=(1, 8))
    assert "without guidance" in runtime_card("openvino", drawing=plain)
    text = runtime_card("openvino", drawing=embedded)
    assert "without guidance" not in text and "it learned scales from 1 to 8" in text


def test_all_teachers_are_named() -> None:
    first, last = (SimpleNamespace(hub_id=name, commit="c") for name in ("a/first", "a/last"))
    assert origin(first, first)["base_model"] == "a/first" and not origin(first, first)["also"]
    back = origin(first, last, first)  # the last stage learns from the first teacher again
    assert (back["also"], back["last"]) == (["a/last"], "a/first")
    text = model_card(origin(first, first, last))
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == ["a/first", "a/last"]
    assert "learned from `a/last`; VAE and text encoders are those of `a/last`" in text
    assert "licence of its teacher; see `a/first`, `a/last`" in text


def test_comfyui_must_be_told_of_v_prediction(sd, sd_v, sdxl) -> None:
    def answer(folder: Path, said: str) -> str:
        derived: Any = SimpleNamespace(loads_in={"ComfyUI, single file": said})
        return loads_in(derived, Teacher(folder))["ComfyUI, single file"]

    assert answer(sd, "yes") == answer(sdxl, "yes") == "yes" and answer(sd_v, "no: why") == "no: why"
    assert answer(sd_v, "yes").startswith("yes: with the node ModelSamplingDiscrete")


def test_inspect_says_it_too(sd_v, tmp_path, capsys) -> None:
    shutil.copytree(sd_v, tmp_path / "v", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "v" / "unet" / "config.json").write_text(json.dumps(layout_config("sd-v2")))
    for folder, said in ((tmp_path / "v", "yes: with the node"), ("sd-v2", "yes")):
        code, out, err = call(capsys, "inspect", folder, "--plan", "bk-base", "--json")
        assert code == 0, err
        answer, _, _ = json.loads(out)["loads_in"]["ComfyUI, single file"].partition(" ModelSamplingDiscrete")
        assert answer == said


def shape(text: str) -> list[str]:
    """Lists the kinds of all parts of a Markdown text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [part.type for token in tokens for part in (token, *(token.children or []))]


@pytest.mark.parametrize("text", NASTY)
def test_text_of_a_user_is_plain_text_in_the_card(text: str) -> None:
    written = card(text)
    _, front, body = written.split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["license"], head["base_model"]) == (text, text)
    assert head.keys() == yaml.safe_load(card("plain").split("---\n")[1]).keys()
    assert shape(body) == shape(card("plain").split("---\n", 2)[2])
    code = re.search(r"```python\n(.*?)\n```", body, re.S)[1]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.args]
    assert text in [ast.literal_eval(call.args[0]) for call in calls]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written)
    spans = [
        c.content for t in MarkdownIt("commonmark").parse(body) for c in t.children or [] if c.type == "code_inline"
    ]
    assert len(spans) == 3 and len(set(spans)) == 1
