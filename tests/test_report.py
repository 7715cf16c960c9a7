"""The report: one self-contained page whose every part follows from the run folder."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from prunet.denoisers.pairs import StagePairs
from prunet.denoisers.unet2d.architecture import UNET2D
from prunet.disk.files import write_json
from prunet.errors import UserError
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import Plan
from prunet.recipe.recipe import Recipe, recipe_yaml
from prunet.report.run import write_report
from prunet.report.runtimes import Exported, better_trades

CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [8, 16, 16],
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "transformer_layers_per_block": [1, 2, 2],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
PAIRS_GONE = ("down_blocks.*.{resnets,attentions}.1", "up_blocks.*.{resnets,attentions}.1")
PLANS = {
    "nothing": (),
    "pairs": PAIRS_GONE,
    "tiny": (*PAIRS_GONE, "mid_block", "down_blocks.2", "up_blocks.0"),
    "depth": ("*_blocks.1.attentions.*.transformer_blocks.1", "mid_block.attentions.0.transformer_blocks.0"),
    "thin mid": ("mid_block.attentions.0", "mid_block.resnets.1"),
}
PROMPTS = ["a red fox", "<script>alert('x')</script> & \"more\"", "very long, " * 60]


class Page(HTMLParser):
    """Parses a page: its tags with their attributes, and its text; asserts that its tags are closed."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def parts(self, *, gone: bool) -> set[str]:
        found = [a for _, a in self.tags if "data-part" in a]
        return {a["data-part"] for a in found if ("gone" in a["class"].split()) is gone}


def losses(derived: Derived, steps: int, every: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(every, steps + 1, every):
        features = {f"feature/{pair.teacher}": 2 / step for pair in derived.pairs()}
        row = {"step": step, "task": 0.4 + 1 / step, "output": 1 / step, "feature": sum(features.values())}
        row |= {"loss": row["task"] + row["output"] + row["feature"]}
        rows.append(row | features | {"learning_rate": 5e-5, "images_per_s": 31.2})
    return rows


def evaluation(derived: Derived, prompts: list[str], memory: float | None) -> dict[str, Any]:
    def distance(scale: float) -> dict[str, Any]:
        levels = [scale * level for level in (0.9, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1)]
        whole = {"denoiser": sum(levels) / 7, "denoiser_by_level": levels, "latent": scale, "picture": scale / 3}
        around = {key: (0.9 * whole[key], 1.1 * whole[key]) for key in ("denoiser", "latent", "picture")}
        by_prompt = [scale * (1 + i * 7 % 5) / 9 for i in range(len(prompts))]
        return whole | {"picture_by_prompt": by_prompt, "intervals": around}

    sizes = {"teacher": derived.teacher_size, "student": derived.student_size}
    fields = ("parameters", "macs", "attention_macs")
    return {
        "protocol": {
            "prompts": prompts,
            "seed": 1234,
            "size": 64,
            "steps": 25,
            "guidance_scale": 7.5,
            "sampler": "dpmsolver++",
            "levels": [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95],
            "precision": "float32",
        },
        "sizes": {name: {field: getattr(size, field) for field in fields} for name, size in sizes.items()},
        "speed": {
            "device": "CPU, 2 threads",
            "batch_size": 2,
            "repeats": 15,
            "dtypes": {"teacher": "float32", "student": "float32"},
            "speeds": {
                "teacher": {"latency_ms": 30.0, "peak_memory_mb": memory},
                "student": {"latency_ms": 20.0, "peak_memory_mb": memory and memory / 2},
            },
        },
        "distance": {"before": distance(1.0), "after": distance(0.1)},
    }


def make_run(
    folder: Path,
    plan: str = "pairs",
    *,
    prompts: list[str] | None = None,
    stages: int = 1,
    rows: int = 20,
    memory: float | None = 100.0,
    sheets: bool = True,
) -> Derived:
    prompts = prompts or PROMPTS
    derived = derive(CONFIG, Plan(plan, PLANS[plan]))
    recipe = Recipe.model_validate(
        {
            "teacher": "/somewhere/private/my-model",
            "plan": Plan(plan, PLANS[plan]),
            "data": {"source": "pictures"},
            "stages": [{"steps": rows * 10}] * stages,
            "evaluation": {"prompts": prompts},
            "output": "runs/fox & crow",
        }
    )
    pictures = folder / "evaluation" / "pictures"
    for i in range(len(prompts)):
        for name in ("teacher", "before", "after"):
            (pictures / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 80), (40 * i, 90, 200)).save(pictures / name / f"{i:04d}.png")
    for number in range(1, stages + 1):
        stage = folder / f"stage-{number}"
        (stage / "sheets").mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in losses(derived, rows * 10, 10)]
        (stage / "log.jsonl").write_text("".join(lines), encoding="utf-8")
        StagePairs(pairs=list(derived.pairs())).save(stage / "pairs.json")
        for step in range(9) if sheets else ():
            Image.new("RGB", (60, 40)).save(stage / "sheets" / f"step-{step:07d}.png")
        (stage / "sheets" / "step-last.png").write_text("of somebody else")
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    derived.result().save(folder / "plan.json")
    measures = evaluation(derived, prompts, memory)
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(measures), encoding="utf-8")
    (folder / "steps.json").write_text(
        json.dumps({name: {"inputs": "0", "seconds": 90.0} for name in ("build", "evaluate")}), encoding="utf-8"
    )
    return derived


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.html"
    page = Page(tmp_path / "report.html")
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import", page.source)
    assert [script.get("src") for script in page.all("script")] == [None]
    assert all(image["alt"] for image in page.all("img"))
    assert "/somewhere/private" not in page.source.split("recipe.yaml</summary>")[0]


def test_headline_says_how_small_and_how_fast(tmp_path: Path) -> None:
    derived = make_run(tmp_path)
    text = Page(write_report(tmp_path)).text
    share = 100 * derived.student_size.parameters / derived.teacher_size.parameters
    assert "Student of my-model by plan pairs" in text
    assert re.search(r"prunet run '[^']*runs/fox & crow'", text)
    assert f"{share:.0f} %" in text
    assert "1.5×" in text
    tile = text.split("of the distance that it had before distillation")[1][:40]
    assert "10 %" in tile, "every distance fell to a tenth"
    assert "build 1.5 min" in text


def test_every_prompt_is_there_as_text_beside_its_three_pictures(tmp_path: Path) -> None:
    make_run(tmp_path, prompts=PROMPTS * 9)
    page = Page(write_report(tmp_path))
    captions = re.findall(r'<figure class="card"[^>]*>\s*<figcaption>(.*?)</figcaption>', page.source, re.S)
    assert [html.unescape(c) for c in captions] == PROMPTS * 9
    assert page.source.count("<script") == 1
    pictures = [image for image in page.all("img") if "drawn by" in image["alt"]]
    assert len(pictures) == 3 * 27
    assert all(image["src"].startswith("data:image/webp;base64,") for image in pictures)
    assert len([image for image in page.all("img") if "at step" in image["alt"]]) == 6  # of nine sheets


def add_image_to_image(folder: Path, scale: float = 0.03125, **other: Any) -> None:
    """Of one picture; `scale`: the distance after distillation, half of that before it."""
    path = folder / "evaluation" / "evaluation.json"
    distance = {
        name: {"picture": value, "by_picture": [value], "interval": [0.9 * value, 1.1 * value]}
        for name, value in (("before", 2 * scale), ("after", scale))
    }
    found = {"strength": 0.6, "seed": 9, "prompts": ["a blue fox"], "distance": distance} | other
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_to_image": found}))
    for name in ("teacher", "before", "after"):
        file = path.parent / "image-to-image" / name / "0000.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80)).save(file)


def test_pictures_from_pictures_stand_beside_their_start(tmp_path: Path) -> None:
    """An evaluation of an older version, which has none, makes a page without them."""
    make_run(tmp_path)
    assert "From a picture" not in Page(write_report(tmp_path)).text
    add_image_to_image(tmp_path)
    page = Page(write_report(tmp_path))
    caption = f"a blue fox \N{LEFTWARDS ARROW} {PROMPTS[0]}"
    ends = ("start", "drawn by teacher", "drawn by student before", "drawn by student after")
    assert [image["alt"] for image in page.all("img") if image["alt"].startswith(caption)] == [
        f"{caption}, {end}" for end in ends
    ]
    row = page.text.split("pictures from pictures")[1][:120]
    assert "0.0625" in row and "0.0312" in row and "50 %" in row


@pytest.mark.parametrize("plan", PLANS)
def test_the_drawing_ghosts_what_the_plan_removes_and_nothing_else(tmp_path: Path, plan: str) -> None:
    derived = make_run(tmp_path, plan, prompts=["a fox"])
    page = Page(write_report(tmp_path))
    roots = [*derived.removed, *derived.form.implied]
    drawn = {n for n in UNET2D.parts(CONFIG) if "transformer_blocks" not in n}
    drawn = {n for n in drawn if not n.endswith("samplers")}
    gone = {n for n in drawn if any(n == root or n.startswith(root + ".") for root in roots)}
    assert page.parts(gone=True) == gone
    assert page.parts(gone=False) == drawn - gone
    blocks = [n for n in UNET2D.module_names(CONFIG) if re.search(r"transformer_blocks\.\d+$", n)]
    kept = [n for n in blocks if not any(n.startswith(root) for root in roots)]
    if len(kept) < len(blocks):
        assert f"{len(kept)} of {len(blocks)} transformer blocks stay" in page.text
    if plan == "depth":
        assert "A 1/2" in page.text
    if plan == "nothing":
        assert "The plan removes nothing" in page.text


def test_curves_show_every_row_of_every_stage(tmp_path: Path) -> None:
    derived = make_run(tmp_path, stages=2, rows=20)
    page = Page(write_report(tmp_path))
    curves = [line["points"].split(" ") for line in page.all("polyline")]
    raw = [line for line in page.all("polyline") if line.get("class") == "raw"]
    assert len(raw) == 2 * (4 + len(derived.pairs()))
    assert {len(line["points"].split(" ")) for line in raw} == {20}
    for points in curves:
        x, y = zip(*(map(float, point.split(",")) for point in points), strict=True)
        assert list(x) == sorted(x)
        assert all(0 <= value <= 1000 for value in (*x, *y))
    assert [curves[i][-1].split(",")[0] for i in (0, 1)] == ["500.0", "1000.0"]  # ends of the two stages
    assert "stage 2" in page.text
    assert "step 400: total" in page.text


def test_a_long_log_stays_a_light_page(tmp_path: Path) -> None:
    make_run(tmp_path, rows=4000, prompts=["a fox"], sheets=False)
    path = write_report(tmp_path)
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_log_of_few_rows(tmp_path: Path, rows: int) -> None:
    make_run(tmp_path, rows=max(rows, 1), prompts=["a fox"])
    if rows == 0:
        (tmp_path / "stage-1" / "log.jsonl").unlink()
    page = Page(write_report(tmp_path))
    dots = [path for path in page.all("path") if path.get("class") == "dot"]
    assert ("How it learned" in page.text) is (rows > 0)
    assert len(dots) >= 14 + 4 * rows  # two lines over seven noise levels, four losses


def test_missing_results_are_noted_or_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, memory=None, sheets=False)
    (tmp_path / "evaluation" / "pictures" / "before" / "0001.png").unlink()
    (tmp_path / "steps.json").unlink()
    page = Page(write_report(tmp_path))
    assert "not measured" in page.text
    assert "no picture" in page.text
    assert "Pictures during training" not in page.text


def test_losses_and_distances_of_zero(tmp_path: Path) -> None:
    """A weight of 0 gives rows of 0, and a plan that removes nothing a distance of 0, which no log scale shows."""
    make_run(tmp_path, "nothing", prompts=["a fox"])
    log = tmp_path / "stage-1" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    zero = {key: 0.0 for key in rows[0] if key.startswith(("feature", "output"))}
    log.write_text("".join(json.dumps(row | zero) + "\n" for row in rows))
    path = tmp_path / "evaluation" / "evaluation.json"
    measures = json.loads(path.read_text())
    for distance in measures["distance"].values():
        distance |= {"denoiser": 0.0, "denoiser_by_level": [0.0] * 7, "latent": 0.0, "picture": 0.0}
    path.write_text(json.dumps(measures))
    page = Page(write_report(tmp_path))
    names = [g["class"] for g in page.all("g")]
    assert names == ["line total", "line task"]
    assert "distance before distillation" not in page.text


def test_measures_by_a_protocol_are_there_with_their_intervals(tmp_path: Path, monkeypatch) -> None:
    make_run(tmp_path, prompts=["a fox"])
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    monkeypatch.setattr("prunet.report.run.Teacher", lambda folder, **_: SimpleNamespace(fingerprint=lambda: "now"))
    assert "Measured by protocol" not in Page(write_report(tmp_path)).text
    clip = {"library": "transformers", "model": "emoji-clip"}
    protocol = {"name": "mine", "version": 3, "count": 882, "sampler": "ddim", "steps": 25, "guidance_scale": 2.0}
    protocol |= {"size": 128, "resize": None, "seed": 0, "clip": clip}
    measures = {"clip_score": {"value": 0.8125, "low": 0.8, "high": 0.825}}
    (tmp_path / "measured" / "mine").mkdir(parents=True)
    result = {"model": {"source": "x", "fingerprint": "before"}, "protocol": protocol, "measures": measures}
    (tmp_path / "measured" / "mine" / "measures.json").write_text(json.dumps(result))
    assert "Measured by protocol" not in Page(write_report(tmp_path)).text  # the student was trained further since then
    result["model"]["fingerprint"] = "now"
    (tmp_path / "measured" / "mine" / "measures.json").write_text(json.dumps(result))
    text = Page(write_report(tmp_path)).text
    assert "emoji-clip score higher is better" in text  # never CLIP score
    assert "0.8125" in text and "0.8000 to 0.8250" in text
    assert "Protocol mine version 3: 882 pictures, ddim, 25 steps, guidance 2.0, 128 px, seed 0" in text


def test_exports_for_openvino_stand_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path, prompts=["a fox"])
    exports = {
        "openvino": (2e7, 0.2, 50.0),
        "openvino-int8": (1.18e7, 0.2, 27.0),
        "openvino-int8-weights": (1.18e7, 0.2, 29.0),
    }
    for name, (size, seconds, psnr) in exports.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "openvino.json", {"bytes": size, "seconds": seconds, "psnr": psnr})
    (tmp_path / "earlier-student").mkdir()
    facts = {"bytes": 1, "seconds": 0.1, "psnr": 60.0, "pipeline": "that of another student"}
    write_json(tmp_path / "earlier-student" / "openvino.json", facts)
    text = Page(write_report(tmp_path)).text
    assert all(name in text for name in exports) and "earlier-student" not in text and "20.0" in text and "29.0" in text
    assert "openvino-int8-weights is a better trade than openvino-int8:" in text
    assert "than openvino:" not in text and "than openvino-int8-weights" not in text


def test_which_export_is_the_better_trade() -> None:
    small, near = Exported("small", 10, 1.0, 25.0), Exported("near", 20, 1.0, 40.0)
    fast, alike = Exported("fast", 20, 0.5, 40.0), Exported("alike", 20, 0.51, 40.3)
    assert better_trades([small]) == []
    assert better_trades([small, near]) == ["None of them is a better trade than another."]
    assert [text.split(":")[0] for text in better_trades([small, near, fast])] == ["fast is a better trade than near"]
    assert better_trades([fast, alike]) == ["None of them is a better trade than another."]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan\.json"):
        write_report(tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
#: Uses every control of the page as a reader would, and leaves what could be seen in its title.
READER = """<script>
const seen = {}, errors = [];
const cards = () => [...document.querySelectorAll(".card")];
const shown = () => cards().filter((one) => one.offsetParent).map((one) => one.querySelector("figcaption").textContent);
const controls = document.getElementById("wall-controls").elements;
const tell = (control, value) => {
  control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
};
const choose = (name, value) => tell(controls[name], value);
seen.first = shown().length;
document.getElementById("wall-all").click();
seen.all = shown().length;
choose("filter", "FOX");
seen.foxes = shown();
choose("filter", "nothing like it");
seen.none = shown();
choose("filter", "");
const errorsOf = () => cards().map((one) => Number(one.dataset.error));
choose("order", "worst");
seen.worst = errorsOf();
choose("order", "best");
seen.best = errorsOf();
choose("order", "given");
seen.given = shown();
choose("view", "after");
const card = cards()[0], divide = card.querySelector(".divide"), ours = card.querySelector(".after img");
const boxes = ["teacher", "after"].map((name) => card.querySelector(`.${name} img`).getBoundingClientRect());
seen.over = ["left", "top", "width"].every((side) => boxes[0][side] === boxes[1][side]);
tell(divide, 25);
seen.clip = getComputedStyle(ours).clipPath;
const box = card.querySelector(".teacher").getBoundingClientRect();
const at = { clientX: box.left + 0.8 * box.width, clientY: box.top + 5, pointerType: "mouse", isPrimary: true };
card.querySelector(".teacher").setPointerCapture = () => {};
card.querySelector(".teacher").dispatchEvent(new PointerEvent("pointerdown", { ...at, bubbles: true }));
seen.dragged = Number(divide.value);
seen.before = getComputedStyle(card.querySelector(".before")).display;
choose("view", "");
seen.beside = getComputedStyle(card.querySelector(".before")).display;
seen.count = controls.count.value;
seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.title = JSON.stringify(seen);
</script>"""


def read_in_chromium(page: Path, reader: str, width: int, folder: Path) -> dict[str, Any]:
    page.write_text(page.read_text().replace("</body>", reader + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", f"--window-size={width},1600", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_every_control_does_what_it_says(tmp_path: Path, width: int) -> None:
    prompts = [f"{prompt} {i}" for i in range(9) for prompt in PROMPTS]
    make_run(tmp_path, prompts=prompts)
    seen = read_in_chromium(write_report(tmp_path), READER, width, tmp_path)
    assert seen["first"] == 24 and seen["all"] == 27
    assert seen["foxes"] == [prompt for prompt in prompts if "fox" in prompt] and not seen["none"]
    assert seen["worst"] == sorted(seen["worst"], reverse=True) != seen["best"]
    assert seen["best"] == sorted(seen["best"]) and seen["given"] == prompts
    assert seen["over"] and seen["clip"] == "inset(0px 0px 0px 25%)" and 78 <= seen["dragged"] <= 82
    assert (seen["before"], seen["beside"]) == ("none", "block")
    assert seen["count"] == "27 of 27 prompts" and not seen["wide"]
