"""Input is read within bounds: too much, too deep, repeated keys and control characters are one line at once."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.table import Table

from prunet import UserError, load_plan, load_recipe
from prunet.console import _Printable
from prunet.disk.reading import DEEPEST, parse_json, parse_yaml
from prunet.errors import LONGEST, printable
from prunet.evaluation.protocol import load_protocol
from prunet.plan.derived import derive
from prunet.recipe.paths import SHIPPED
from prunet.recipe.recipe import load_recipe as read
from prunet.teacher.known import layout_config


def laughs(form: str, levels: int = 9) -> str:
    """Ten of ten of ten ... values, in a page of a few lines; `form` takes ten aliases."""
    lines = ["a0: &a0 {k: x}"]
    lines += [f"a{i + 1}: &a{i + 1} " + form % tuple([f"*a{i}"] * 10) for i in range(levels)]
    return "\n".join(lines)


TOO_MUCH = {
    "lists of lists": (laughs("[" + ", ".join(["%s"] * 10) + "]"), "more than 50,000 values"),
    "mappings of mappings": (
        laughs("{" + ", ".join(f"{c}: %s" for c in "abcdefghij") + "}"),
        "more than 50,000 values",
    ),
    "merged mappings": (laughs("{<<: [" + ", ".join(["%s"] * 10) + "]}"), "more than 50,000 values"),
    "an alias of itself": ("a: &a [1, *a]", "an alias of a list or mapping that contains the alias"),
    "brackets": ("a: " + "[" * 40 + "]" * 40, "inside one another"),
    "many brackets": ("a: " + "[" * 5000, "inside one another"),
    "braces": ("a: " + "{b: " * 30 + "1" + "}" * 30, "inside one another"),
    "aliases inside one another": (
        "a0: &a0 [x]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(1000)),
        "inside one another",
    ),
    "a long page": ("a: b\n" + "# nothing\n" * 100_000, "more than 500,000"),
    "a long number": ("a: 0x" + "F" * 10_000, "a number or date of 10,002 characters"),
    "a long number in base 60": ("a: 1" + ":59" * 100_000, "a number or date of"),
    "a key given twice": ("a: 1\nb: {c: 1, c: 2}", "key 'c' is given twice"),
    "half a character": (r'a: "\ud83d"', "half a character"),
    "a null character": (r'a: ["x\0y"]', "a null character"),
    "a null character in a key": (r'"x\0y": 1', "a null character"),
    "Python": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
}


def test_json_is_yaml_with_emoji_in_two_halves_too() -> None:
    text = json.dumps({"a \U0001f600": ["\U0001f600", "ä", "plain"]})
    assert "ud83d" in text and parse_yaml(text, "x") == json.loads(text)


@pytest.mark.parametrize("case", TOO_MUCH)
@pytest.mark.parametrize("reader", ["recipe", "plan", "protocol", "--set"])
def test_too_much_is_refused_at_once(case: str, reader: str, tmp_path: Path) -> None:
    text, words = TOO_MUCH[case]
    page = tmp_path / "page.yaml"
    page.write_text(text)
    good = SHIPPED / "demo.yaml"
    readers = {"recipe": read, "plan": load_plan, "protocol": load_protocol}
    start = time.process_time()
    with pytest.raises(UserError, match=words) as error:
        _ = readers[reader](page) if reader != "--set" else load_recipe(good, [f"data={text}"])
    assert time.process_time() - start < 5
    assert len(str(error.value)) < LONGEST + 100


def test_an_alias_is_a_value_of_its_own(tmp_path: Path) -> None:
    page = "teacher: t\nplan: bk-tiny\ndata: {prompts: [a]}\nevaluation: {prompts: [a]}\noutput: o\n"
    (tmp_path / "r.yaml").write_text(page + "stages: [&s {steps: 5, losses: {task: 1}}, *s]\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["stages.0.losses.task=2", "stages.1.steps=7"])
    assert [(stage.steps, stage.losses.task) for stage in recipe.stages] == [(5, 2), (7, 1)]


def test_values_are_counted_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunet.disk.reading.MOST", 1000)
    assert len(parse_yaml("[" + "1," * 900 + "]", "here")) == 900
    with pytest.raises(UserError, match="values, aliases counted"):
        parse_yaml("[" + "1," * 1000 + "]", "here")


def test_a_long_recipe_is_read() -> None:
    prompts = [f"a picture of the number {i}" for i in range(5000)]
    assert parse_yaml("prompts:\n" + "".join(f"  - {p}\n" for p in prompts), "here") == {"prompts": prompts}
    depth = DEEPEST - 2
    assert str(parse_yaml("[" * depth + "]" * depth, "here")).count("[") == depth


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "1," * 5_000_000 + "1]"])
def test_json_is_read_within_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deep|characters"):
        parse_json(text)


@pytest.mark.parametrize(
    "patterns",
    [
        ["down_blocks.{0,1}" + "{,x}" * 40],
        ["{a,b,c,d,e,f,g,h,i,j}" * 12],
        [",".join(["{a"] * 50) + "}" * 50 + "{,}" * 200],
        ["mid_block", *["down_blocks.{" + ",".join(map(str, range(300))) + "}.resnets.1"] * 5],
        ["x" * 100_000],
        ["[" * 900],
        ["*" * 900 + "a"],
        ["a.*" * 300 + ".b"],
    ],
)
def test_a_pattern_stands_for_no_more_than_it_should(patterns: list[str]) -> None:
    start = time.process_time()
    with pytest.raises(UserError) as error:
        derive(layout_config("sd-v1"), load_plan(patterns))
    assert time.process_time() - start < 5
    assert len(str(error.value)) < LONGEST + 100


@pytest.mark.parametrize("value", [{"remove": ["mid_block"], "name": ["x"]}, {"remove": [], "source": True}])
def test_the_texts_of_a_plan_are_texts(value: dict) -> None:
    with pytest.raises(UserError, match="of a plan must be a text"):
        load_plan(value)


NUMBERS = {
    "stages.0.steps": "an integer",
    "stages.0.batch_size": "an integer",
    "stages.0.learning_rate": "a real number",
    "stages.0.caption_dropout": "a fraction",
    "stages.0.ema_decay": "one that may be left out",
    "stages.0.losses.feature": "a weight",
    "stages.0.losses.weights": "weights by name",
    "data.size": "a size",
    "data.limit": "a count",
    "evaluation.steps": "steps",
    "sheet.every": "of another part",
    "seed": "at the top",
}


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("truth", ["true", "false", "yes"])
def test_true_is_not_a_number(key: str, truth: str) -> None:
    good = SHIPPED / "demo.yaml"
    value = f"{{mid_block: {truth}}}" if key.endswith("weights") else truth
    with pytest.raises(UserError, match=f"{key}.*give a number, not (true|false)"):
        load_recipe(good, [f"{key}={value}"])


def test_true_is_not_a_number_of_a_protocol(tmp_path: Path) -> None:
    shipped = (Path(__file__).parent.parent / "prunet" / "evaluation" / "protocols" / "parti.yaml").read_text()
    for key in ("seed", "steps", "guidance_scale", "version", "size", "jpeg"):
        lines = [line for line in shipped.splitlines() if not line.startswith(f"{key}:")]
        (tmp_path / "p.yaml").write_text("\n".join([*lines, f"{key}: true"]))
        with pytest.raises(UserError, match=f"{key}: give a number, not true"):
            load_protocol(tmp_path / "p.yaml")


def test_a_key_is_set_once() -> None:
    good = SHIPPED / "demo.yaml"
    with pytest.raises(UserError, match=r"--set: key 'stages.0.steps' is given twice"):
        load_recipe(good, ["stages.0.steps=1", "seed=3", " stages.0.steps =2"])


@pytest.mark.parametrize("index", ["9" * 5000, "²", "-1", "1_0", "00"])
def test_an_index_of_a_list_must_exist(index: str) -> None:
    good = SHIPPED / "demo.yaml"
    for key in (f"stages.{index}.steps", f"stages.{index}", "a." * 1000 + "b"):
        with pytest.raises(UserError, match="--set"):
            load_recipe(good, [f"{key}=3"])


OBEYED = ["\x1b[2J", "\x9b31m", "\x07", "\x7f", "\b", "\x00", "\r", "\u202e", "\u2066", "\u2028", "\udcff"]


@pytest.mark.parametrize("character", OBEYED)
def test_messages_hold_no_terminal_commands(character: str) -> None:
    name = f"cat{character}.png"
    assert character not in str(UserError(f"{name}: no picture"))
    out = io.StringIO()
    table = Table(name)
    table.add_row(name)
    console = _Printable(file=out, force_terminal=True, color_system="standard")
    console.print(f"[bold]{name}[/]", soft_wrap=True)
    console.print(table)
    shown = out.getvalue()
    assert character not in shown
    assert "\x1b[1m" in shown  # rich's own markup still works


def test_printable_text_stays_as_it_is() -> None:
    for text in ("a b\n\tc", "猫 🐈‍⬛ é", "[bold]", "\\x1b"):
        assert printable(text) == text


def test_a_long_line_says_what_is_wrong_and_how_to_fix_it() -> None:
    line = str(UserError(f"mine.yaml: bad value {'x' * 10_000_000}: give a number"))
    assert len(line) < LONGEST + 100
    assert line.startswith("mine.yaml: bad value") and line.endswith("x: give a number")


def test_a_deeply_nested_config_is_refused(sd: Path, tmp_path: Path) -> None:
    from prunet import Teacher

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(UserError, match=r"unet.config\.json is not readable JSON"):
        Teacher(tmp_path)
