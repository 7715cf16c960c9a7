"""Mutated inputs: every command ends with exit code 0 or 2, in one line, within seconds and in little memory.

The short form is for every change; `python -m pytest -m slow tests/test_fuzz.py` tries 10,000.
"""

import contextlib
import copy
import io
import json
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL_UNETS, make_pictures, make_pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_blocks import SMALL, make_folder

from prunet import cli, derive, load_plan
from prunet.runs import estimate, personalization

LONGEST_S = 10
MOST_KB = 1_000_000
HERE = Path(__file__).parent.parent

#: Values of the wrong type, size or depth, and some that may fit.
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 8, 16, 1.5, 1e-5, 1e308, 10**9, 2**63, 10**30, float("inf"), float("nan")),
    *(
        "",
        "x",
        "mid_block",
        "*",
        "a" * 10_000,
        "\x1b[2J",
        "[/]",
        "\0",
        "\ud800",
        "../..",
        "/dev/null",
        "t-{0..99999999999}.tar",
        "2001-13-45",
        "1e5",
    ),
    *([], [[]], [1, 2], ["x"], [None], [[[[1]]]], {}, {"x": 1}, {"": None}, ["{a,b}" * 40], ["down_blocks.{0,1}"]),
]
value = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda s: st.lists(s) | st.dictionaries(st.text(max_size=8), s),
        max_leaves=8,
    ),
)
#: Pieces of YAML and JSON that are put into a page.
PIECES = [
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
    "!!python/name:os.system ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "\n",
    '"',
    "'",
    "#",
    "|",
    ">",
    "\t",
    "\x00",
    "é",
    "0x",
    ":59" * 100,
    "? ",
    "---\n",
    "%YAML 9\n",
]

RECIPE: dict[str, Any] = yaml.safe_load("""
teacher: {source: TEACHER, config: null}
plan: bk-small
data: {source: PICTURES, size: 16, crop: center, flip: false, limit: 3, views: 1}
stages:
  - {steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 0, losses: {task: 1, weights: {up_blocks.*: 2}}}
  - steps: 2
    batch_size: 2
    ema_decay: null
    min_snr_gamma: 5
    losses: {task: 1, level: block}
    plan: {name: p, remove: [mid_block, "{down,up}_blocks.*.{resnets,attentions}.1"]}
evaluation: {prompts: [a, b], steps: 2, guidance_scale: 2, sampler: ddim}
sheet: {prompts: [a], every: 0}
export: {fp16: false, license: mit}
output: OUTPUT
seed: 1
checkpoint_every: 10
""")
PROTOCOL: dict[str, Any] = {
    **{"name": "x", "version": 1, "prompts": {"source": "h", "file": "prompts.txt", "count": 2}, "seed": 1, "size": 16},
    **{"steps": 2, "metrics": ["clip_score"], "clip": {"model": "x", "source": "t"}, "sampler": "ddim", "jpeg": 90},
}
PARTS = ("unet", "vae", "text_encoder")
TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel")
CONFIGS = (*(f"{part}/config.json" for part in PARTS), "scheduler/scheduler_config.json", "model_index.json")


class Place:
    """A teacher, pictures and a folder for the mutated inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = make_pipeline(folder / "sd", "sd")
        self.pictures = make_pictures(folder / "pictures", 3)
        (folder / "prompts.txt").write_text("a\nb\n")
        self.transformers = {name: make_folder(folder / name, name) for name in TRANSFORMERS}
        self.student = folder / "student"
        derived = derive(SMALL_UNETS["sd"], load_plan("bk-small"))
        derived.result().save(self.student / "plan.json")
        self.configs = {name: json.loads((self.teacher / name).read_text()) for name in CONFIGS}
        self.recipe = copy.deepcopy(RECIPE)
        self.recipe["teacher"]["source"], self.recipe["data"]["source"] = str(self.teacher), str(self.pictures)
        self.recipe["output"] = str(folder / "run")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    def estimate(self, page: Path, *options: str) -> None:
        check("estimate", page, "--device", "cpu", "--precision", "no", *options)

    # -- what is tried

    def recipe_value(self, path: tuple, new: Any) -> None:
        self.estimate(self.write("r.yaml", yaml.safe_dump(put(self.recipe, path, new))))

    def set_value(self, path: tuple, new: Any) -> None:
        page = self.write("r.yaml", yaml.safe_dump(self.recipe))
        try:
            text = json.dumps(new) if not isinstance(new, str) else new
        except ValueError:  # an integer longer than Python converts
            return
        if "\0" not in text:  # which no command line can hold
            self.estimate(page, "--set", f"{'.'.join(map(str, path))}={text}")

    def recipe_text(self, at: int, piece: str, cut: int) -> None:
        text = yaml.safe_dump(self.recipe)
        at %= len(text)
        self.estimate(self.write("r.yaml", text[:at] + piece + text[at + cut :]))

    def plan(self, new: Any) -> None:
        check("inspect", "sd-v1", "--plan", self.write("p.yaml", dump(new)), "--json")

    def plan_patterns(self, new: list[str]) -> None:
        self.plan({"remove": new})

    def config(self, name: str, path: tuple, new: Any) -> None:
        file = self.teacher / name
        before = file.read_text()
        try:
            file.write_bytes(json.dumps(put(self.configs[name], path, new)).encode("utf-8", "surrogatepass"))
            check("inspect", self.teacher, "--json")
            self.estimate(self.write("r.yaml", yaml.safe_dump(self.recipe)))
        finally:
            file.write_text(before)

    def transformer(self, name: str, key: str, new: Any) -> None:
        file = self.transformers[name] / "transformer" / "config.json"
        before = file.read_text()
        try:
            file.write_bytes(json.dumps({**json.loads(before), key: new}).encode("utf-8", "surrogatepass"))
            check("inspect", self.transformers[name], "--json")
        finally:
            file.write_text(before)

    def protocol(self, path: tuple, new: Any) -> None:
        page = self.write("protocol.yaml", yaml.safe_dump(put(PROTOCOL, path, new)))
        check("measure", self.folder / "nowhere", "--protocol", page, "-o", self.folder / "m", "--device", "cpu")

    def prompts(self, name: str, content: bytes) -> None:
        path = self.folder / f"list{name}"
        path.write_bytes(content)
        self.recipe_value(("evaluation", "prompts"), str(path))

    def adapter(self, key: str, metadata: Any) -> None:
        file, text = self.folder / "lora.safetensors", json.dumps(metadata)
        layer = {"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4, 3, 3), key: torch.ones(16, 4, 1, 1)}
        save_file(layer, file, metadata={"lora_adapter_metadata": text, "format": "pt"})
        check("adapt", file, "--to", self.student, "-o", self.folder / "new.safetensors")

    def picture(self, option: str, at: int, piece: bytes, cut: int) -> None:
        given = {name: self.folder / f"{name}.png" for name in ("image", "mask")}
        whole = (self.pictures / "000.png").read_bytes()
        for name, path in given.items():
            at %= len(whole)
            path.write_bytes(whole[:at] + piece + whole[at + cut :] if name == option else whole)
        options = [text for name, path in given.items() for text in (f"--{name}", path)]
        where = ("-o", self.folder / "drawn", "--device", "cpu")
        check("generate", self.teacher, "a", *options, "--steps", 1, *where)

    def subject(self, prompt: str, option: str, new: Any, piece: bytes) -> None:
        (folder := self.folder / "subject").mkdir(exist_ok=True)
        (folder / "0.png").write_bytes((self.pictures / "000.png").read_bytes()[: 1000 - len(piece)] + piece)
        given = (self.teacher, "--pictures", folder, "--prompt", prompt, option, dump(new).strip())
        check(
            "personalize", *given, "--estimate", "-o", self.folder / "personal", "--device", "cpu", "--precision", "no"
        )

    def header(self, at: int, piece: bytes, cut: int) -> None:
        file = self.teacher / "unet" / "diffusion_pytorch_model.safetensors"
        whole = file.read_bytes()
        at %= 300
        try:
            file.write_bytes(whole[:at] + piece + whole[at + cut :])
            self.estimate(self.write("r.yaml", yaml.safe_dump(self.recipe)))
        finally:
            file.write_bytes(whole)


def dump(new: Any) -> str:
    try:
        return yaml.safe_dump(new)
    except ValueError:
        return json.dumps(str(type(new)))


def put(whole: Any, path: tuple, new: Any) -> Any:
    """`whole` with another value at `path`."""
    whole = copy.deepcopy(whole)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


def paths(whole: Any, before: tuple = ()) -> list[tuple]:
    items = whole.items() if isinstance(whole, dict) else enumerate(whole) if isinstance(whole, list) else ()
    return [found for key, inner in items for found in ((*before, key), *paths(inner, (*before, key)))]


class TooLong(BaseException):
    """Raised when a command takes too long; no `except Exception` catches it."""


def stop(*_: object) -> None:
    raise TooLong


def check(*args: object) -> None:
    """Runs `prunet ARGS` in this process; anything but exit code 0 or 2 in one line, in time, fails."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # CPU seconds of this process, because the machine may be busy.
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_S)
    argv, sys.argv = sys.argv, ["prunet", *map(str, args)]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.argv = argv
    said = [line for line in err.getvalue().splitlines() if line.startswith("error")]
    assert code == 0 or (code == 2 and len(said) == 1), err.getvalue()
    assert len("".join(said)) < 1000
    assert "\x1b" not in err.getvalue() + out.getvalue()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KB


#: Keys of configs that diffusers and transformers wrote.
config_keys = [(name, (key,)) for name in CONFIGS for key in json.loads((HERE / "emoji/emoji-sd" / name).read_text())]
transformer_keys = [(name, key) for name in TRANSFORMERS for key in ["_class_name", *SMALL[name][0]]]
patterns = st.lists(
    st.text("down_blocks.upresntai*?[]{},0123!-", max_size=40)
    | st.sampled_from(["mid_block", "up_blocks.0", "down_blocks.*.attentions.1"]),
    max_size=4,
)
adapter_key = "lora_unet_conv_in.lora_up.weight"
adapter_keys = st.text("loraunetcivpdw_.AB01", max_size=40) | st.sampled_from(
    ["ip_adapter.1.to_k_ip.weight", "image_proj.x", "lora_te_x", f"unet.{adapter_key}", adapter_key]
)
peft_fields = [f"unet.{field}" for field in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora")]
subject_options = ["class-prompt", "class-pictures", "prior-weight", "lora", "steps", "batch-size", "learning-rate"]
pieces = st.sampled_from(PIECES) | st.text(max_size=6)
mutations = st.one_of(
    st.tuples(st.just("recipe_value"), st.sampled_from(paths(RECIPE)), value),
    st.tuples(st.just("set_value"), st.sampled_from(paths(RECIPE)), value),
    st.tuples(st.just("recipe_text"), st.integers(0, 3000), pieces, st.integers(0, 20)),
    st.tuples(st.just("plan"), value),
    st.tuples(st.just("plan_patterns"), patterns),
    st.builds(lambda at, new: ("config", *at, new), st.sampled_from(config_keys), value),
    st.builds(lambda at, new: ("transformer", *at, new), st.sampled_from(transformer_keys), value),
    st.tuples(st.just("protocol"), st.sampled_from(paths(PROTOCOL)), value),
    st.tuples(st.just("prompts"), st.sampled_from([".txt", ".csv", ".tsv", ""]), st.binary(max_size=60)),
    st.tuples(st.just("adapter"), adapter_keys, value),
    st.tuples(st.just("adapter"), st.just(adapter_key), st.dictionaries(st.sampled_from(peft_fields), value)),
    st.builds(
        lambda *given: ("picture", *given),
        st.sampled_from(["image", "mask"]),
        st.integers(0, 3000),
        st.binary(max_size=9),
        st.integers(0, 3000),
    ),
    st.tuples(
        st.just("subject"),
        st.text(max_size=8),
        st.sampled_from([f"--{name}" for name in (*subject_options, "guidance-scale", "size", "seed", "sheet-every")]),
        value,
        st.sampled_from([b""] * 3 + [b"x" * 900]),
    ),
    st.tuples(st.just("header"), st.integers(0, 300), st.binary(max_size=9), st.integers(0, 9)),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    # The measurements of an estimate would take most of the time, and they do not depend on the input.
    for module in (estimate, personalization):
        patch.setattr(module, "seconds_per_image", lambda *_: 0.1)
        patch.setattr(module, "step_memory", lambda *_, **__: 1)
    folder = tmp_path_factory.mktemp("fuzz")
    yield Place(folder)
    patch.undo()
    shutil.rmtree(folder)


def attempt(place: Place, mutation: tuple) -> None:
    kind, *args = mutation
    getattr(place, kind)(*args)


given_a_mutation = given(mutation=mutations)
ALWAYS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@given_a_mutation
@settings(max_examples=150, derandomize=True, **ALWAYS)
def test_mutated_inputs_end_in_one_line(place: Place, mutation: tuple) -> None:
    attempt(place, mutation)


@pytest.mark.slow
@given_a_mutation
@settings(max_examples=10_000, **ALWAYS)
def test_ten_thousand_mutated_inputs_end_in_one_line(place: Place, mutation: tuple) -> None:
    attempt(place, mutation)
