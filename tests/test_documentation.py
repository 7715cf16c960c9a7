"""The documentation: every key and option is described, every command exists, every link leads somewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from documented import PAGES, ROOT, VERBS, commands, complaint
from pydantic import BaseModel
from test_cli import call

import prunet
from prunet.evaluation.protocol import Protocol
from prunet.exports.single_file import export_single_file
from prunet.recipe.recipe import Recipe
from prunet.runs.ablation import Ablation

sys.path.append(str(ROOT / "docs" / "site"))
import reference

HERE = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def parts(hint: Any) -> Iterator[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
        for field in hint.model_fields.values():
            yield from parts(field.annotation)
    for inside in get_args(hint):
        yield from parts(inside)


@pytest.mark.parametrize("page", [Recipe, Protocol, Ablation])
def test_every_key_is_described_and_in_the_reference(page: type[BaseModel]) -> None:
    text = reference.recipe_page()
    for part in parts(page):
        for key, field in part.model_fields.items():
            assert field.description, f"{part.__name__}.{key} has no description"
            assert re.search(rf"\| `(\w+\.)*{key}` \|", text)


def test_every_option_is_described_and_in_the_reference() -> None:
    text = reference.cli_page()
    for name, verb in VERBS.items():
        assert f"## {name}\n" in text
        assert "\n" not in verb.help.replace("\n\n", ""), f"prunet {name}: its help breaks a line in mid-sentence"
        for parameter in verb.params:
            assert parameter.help, f"prunet {name}: {parameter.name} has no help"
            assert parameter.name == "help" or any(
                f"`{opt}" in text for opt in (*parameter.opts, parameter.name.upper())
            )


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    wrong = [f"{command.text}: {why}" for command in commands(page) if (why := complaint(command))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", link) and not link.startswith("reference/"):  # made with the site
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


@pytest.mark.processes
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Built strictly: broken links, broken anchors and unreadable docstrings are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    navigation = (tmp_path / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in navigation, f"docs/{page.name} is not in the navigation"
    names = (tmp_path / "reference" / "api.html").read_text()
    assert [name for name in prunet.__all__ if name != "__version__" and f'id="prunet.{name}"' not in names] == []
    elsewhere = re.compile(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=.?(?:https?:)?//")
    for page in tmp_path.rglob("*.html"):
        assert elsewhere.findall(page.read_text()) == [], page


@pytest.mark.processes
def test_the_tutorial_goes_from_pictures_to_a_single_file(tmp_path: Path) -> None:
    """Runs the tutorial's commands and its edit in a folder with a single file and pictures, with fewer of both."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    edit = yaml.safe_load(next(text for kind, text in blocks if kind == "yaml"))
    export_single_file(ROOT / "emoji/emoji-sd", tmp_path / "my-model.safetensors", fp16=True)
    unpack = (ROOT / "emoji/unpack.py", ROOT / "emoji/data/train-0000.tar", tmp_path / "pictures", "--limit", 8)
    subprocess.run([sys.executable, *map(str, unpack)], check=True, capture_output=True)
    (tmp_path / "heldout.txt").write_text(next(text for kind, text in blocks if kind == "text"))
    for command in (line for kind, text in blocks if kind == "console" for line in re.findall(r"^\$ (.*)", text, re.M)):
        command = re.sub(r"^prunet ", f"{sys.executable} -m prunet ", command)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=HERE)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if "> mine.yaml" in command:
            mine = yaml.safe_load((tmp_path / "mine.yaml").read_text())
            mine["stages"][0] |= edit["stages"][0] | {"steps": 2, "batch_size": 2, "warmup_steps": 0}
            mine["evaluation"] |= edit["evaluation"] | {"steps": 2, "limit": 2}
            (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    assert (tmp_path / "runs/my-model-bk-small/student.safetensors").is_file()
    assert len(list(tmp_path.glob("generated/*.png"))) == 4


@pytest.mark.processes
def test_commands_that_need_nothing_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the commands about plans and layouts, which need no files."""
    layouts = r"prunet (plans|protocols|inspect (sd|flux|qwen|z-image|sana|pixart)[\w.-]* --plan [\w-]+)$"
    found = {" ".join(command.words) for page in PAGES for command in commands(page)}
    ready = sorted(text for text in found if re.fullmatch(layouts, text))
    assert len(ready) >= 5
    for text in ready:
        code, out, err = call(capsys, *text.split()[1:])
        assert code == 0 and out, f"{text}: {err}"
