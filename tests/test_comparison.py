"""Several runs on one page: all of them are shown, and runs evaluated differently are refused."""

import json
import shutil
from pathlib import Path

import pytest
from test_report import CHROMIUM, PROMPTS, READER, Page, add_image_to_image, make_run, read_in_chromium

from prunet import Runtime, load_recipe, run
from prunet.errors import UserError
from prunet.evaluation.results import read_evaluation
from prunet.report.comparison import write_comparison


def make_runs(folder: Path, prompts: list[str]) -> list[Path]:
    folders = [folder / name / "run" for name in ("first", "second", "third", "fourth")]
    for each, plan in zip(folders, ("pairs", "tiny", "depth", "nothing"), strict=True):
        make_run(each, plan, prompts=prompts, rows=3, sheets=False)
    return folders


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("made"), PROMPTS[:1])


@pytest.fixture
def runs(made: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / run.parent.name / "run")) for run in made]


@pytest.fixture
def long_runs(tmp_path: Path) -> list[Path]:
    """Runs with more prompts than a page shows at first."""
    return make_runs(tmp_path, [f"{prompt} {i}" for i in range(9) for prompt in PROMPTS])


def change(folder: Path, part: str, **values: object) -> None:
    path = folder / "evaluation" / "evaluation.json"
    whole = json.loads(path.read_text())
    whole[part] |= values
    path.write_text(json.dumps(whole))


def test_every_run_has_its_own_name_on_the_page(long_runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(long_runs, tmp_path / "page.html"))
    for name in ("first/run", "second/run", "third/run", "fourth/run"):
        assert name in page.text
        assert len([i for i in page.all("img") if i["alt"].endswith(f"drawn by {name}")]) == 27
    assert len([image for image in page.all("img") if image["alt"].endswith("drawn by teacher")]) == 27
    assert {g["class"] for g in page.all("g")} == {f"line run-{i}" for i in range(4)}


def test_runs_evaluated_differently_are_refused(runs: list[Path], tmp_path: Path) -> None:
    change(runs[2], "protocol", guidance_scale=3.0, student="another")
    with pytest.raises(UserError, match=r"third/run: evaluated differently .*: they differ in guidance_scale,"):
        write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_runs_that_differ_in_their_training_seed_are_compared(finished: Path, tmp_path: Path) -> None:
    """Their pictures are still drawn from the same noise."""
    folders = [Path(shutil.copytree(finished, tmp_path / name)) for name in ("one", "two")]
    recipe = load_recipe(folders[1] / "recipe.yaml", [f"output={folders[1]}", "seed=5"])
    for part in ("cache", "stage-1"):
        shutil.rmtree(folders[1] / part)
    cpu = Runtime(device="cpu", precision="no")
    run(recipe, cpu, until="evaluate")
    first, second = (read_evaluation(folder / "evaluation") for folder in folders)
    assert first.distance["after"].denoiser != second.distance["after"].denoiser
    for name in ("teacher", "before"):
        pictures = [(folder / "evaluation/pictures" / name / "0001.png").read_bytes() for folder in folders]
        assert pictures[0] == pictures[1]
    assert "drawn by two" in write_comparison(folders, tmp_path / "page.html").read_text()
    run(load_recipe(folders[1] / "recipe.yaml", ["evaluation.seed=6"]), cpu, until="evaluate")
    with pytest.raises(UserError, match="they differ in seed"):
        write_comparison(folders, tmp_path / "page.html")


def test_lpips_is_compared_if_all_runs_have_it_by_the_same_weights(runs: list[Path], tmp_path: Path) -> None:
    def add_lpips(folder: Path, value: float, made_by: str) -> None:
        path = folder / "evaluation" / "evaluation.json"
        whole = json.loads(path.read_text())
        whole["distance"]["after"]["lpips"] = value
        whole["distance"]["after"]["intervals"]["lpips"] = (value - 0.01, value + 0.01)
        path.write_text(json.dumps(whole | {"lpips": made_by}))

    def text() -> str:
        return Page(write_comparison(runs[:2], tmp_path / "page.html")).text

    add_lpips(runs[0], 0.4321, "these")
    assert "LPIPS" not in text()
    add_lpips(runs[1], 0.1234, "those")
    assert "LPIPS" not in text()
    add_lpips(runs[1], 0.1234, "these")
    assert "LPIPS" in text() and "0.432" in text() and "0.123" in text()


def test_pictures_from_pictures_are_compared_where_all_have_them_from_the_same_starts(
    runs: list[Path], tmp_path: Path
) -> None:
    def page() -> Page:
        return Page(write_comparison(runs[:2], tmp_path / "page.html"))

    add_image_to_image(runs[0], 0.4321)
    assert "From a picture" not in page().text
    add_image_to_image(runs[1], 0.1234, strength=0.7)
    assert "ictures from pictures" not in page().text and "From a picture" not in page().text
    add_image_to_image(runs[1], 0.1234)
    found = page()
    assert "pictures from pictures" in found.text and "0.432" in found.text and "<b>0.123</b>" in found.source
    caption = f"a blue fox \N{LEFTWARDS ARROW} {PROMPTS[0]}"
    ends = ("start", "drawn by teacher", "drawn by first/run", "drawn by second/run")
    assert [image["alt"] for image in found.all("img") if image["alt"].startswith(caption)] == [
        f"{caption}, {end}" for end in ends
    ]


def test_wrong_sets_of_runs_are_refused(runs: list[Path], tmp_path: Path) -> None:
    for folders, message in (
        (runs[:1], "give 2 to 8 run folders, not 1"),
        ([runs[0], runs[0]], "is given twice"),
        ([runs[0], tmp_path], "not evaluated"),
        ([runs[0], runs[1].parent / ".." / "first" / "run"], "is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            write_comparison(folders, tmp_path / "page.html")


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_its_controls_work(long_runs: list[Path], tmp_path: Path, width: int) -> None:
    page = write_comparison(long_runs, tmp_path / "page.html")
    for_a_run = (
        READER.replace('"after"', '"run-2"').replace(".after img", ".run-2 img").replace('".before"', '".run-1"')
    )
    seen = read_in_chromium(page, for_a_run, width, tmp_path)
    assert (seen["first"], seen["all"], seen["over"]) == (24, 27, True)
    assert seen["clip"] == "inset(0px 0px 0px 25%)" and 78 <= seen["dragged"] <= 82
    assert (seen["before"], seen["beside"], seen["wide"]) == ("none", "block", False)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("recipe.yaml", None),
        ("recipe.yaml", "{}"),
        ("recipe.yaml", "a: ["),
        ("plan.json", "{}"),
        ("evaluation/evaluation.json", "{}"),
        ("stage-1/log.jsonl", "{}"),
        ("steps.json", "{}"),
        ("evaluation/pictures/after/0000.png", ""),
    ],
)
def test_a_damaged_run_is_one_line(runs: list[Path], tmp_path: Path, file: str, text: str | None) -> None:
    if text is None:
        (runs[1] / file).unlink()
    else:
        (runs[1] / file).write_text(text)
    with pytest.raises(UserError, match="second/run"):
        write_comparison(runs, tmp_path / "page.html")
