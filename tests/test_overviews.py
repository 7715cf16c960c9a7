"""Commands that only read: the runs in a folder, and the state of the installation."""

import json
import shutil
import socket
import tomllib
from pathlib import Path

import pytest
from test_cli import call

from prunet.disk.files import read_json, write_json
from prunet.disk.ownership import hold, worker_of
from prunet.report.live import write_live
from prunet.runs import doctor
from prunet.runs.listing import find_runs
from prunet.runs.watching import look

ROOT = Path(__file__).parent.parent


def test_runs_with_their_state_plan_distance_and_size(capsys, finished, tmp_path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "done")
    shutil.copytree(finished, runs / "arms" / "seed-1")
    steps = read_json(runs / "arms" / "seed-1" / "steps.json")
    write_json(runs / "arms" / "seed-1" / "steps.json", {key: steps[key] for key in ("plan", "build", "cache")})
    shutil.copytree(finished, runs / "hurt")
    (runs / "hurt" / "plan.json").write_text("{")
    with hold(runs / "done", "run"):
        found = {Path(run.run).name: run for run in find_runs(runs)}
        assert "process" in found["done"].worker and found["seed-1"].worker is None
    assert worker_of(runs / "done") is None
    assert found.keys() == {"seed-1", "done", "hurt"} and found["hurt"].state.startswith("damaged: ")
    assert (found["done"].state, found["seed-1"].state) == ("done", "stage-1, step 2 of 2")
    distance = read_json(runs / "done" / "evaluation" / "evaluation.json")["distance"]
    assert found["done"].after == distance["after"]["picture"] and found["seed-1"].after is None
    assert found["done"].plan == "bk-small" and found["done"].bytes > 10**5
    code, out, _ = call(capsys, "list", runs / "done")
    assert code == 0 and "bk-small" in out and "→" in out
    code, out, _ = call(capsys, "list", tmp_path / "runs" / "done" / "evaluation")
    assert code == 0 and "no runs here" in out
    assert call(capsys, "list", tmp_path / "none")[0] == 2


def test_doctor_names_versions_and_every_optional_part(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    code, out, _ = call(capsys, "doctor", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0 and facts["versions"].keys() >= {"prunet", "python", "torch", "diffusers"}
    assert "HF_HUB_OFFLINE" in facts["hub"]["state"] and facts["memory"]["total"] > facts["memory"]["free"] > 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert facts["extras"].keys() == project["optional-dependencies"].keys() - {"dev", "docs", "emoji"}
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "bf16" in out and "optional" in out


def test_messages_name_the_package_and_not_a_clone() -> None:
    pages = [path for path in (ROOT / "prunet").rglob("*") if path.suffix in (".py", ".j2", ".yaml", ".js")]
    for path in [*pages, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        assert "pip install -e '.[" not in path.read_text(), f"{path}: write pip install 'prunet[...]'"


def test_an_unreachable_hub_is_no_failure(monkeypatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing listens there
        assert doctor.reach(f"http://127.0.0.1:{closed.getsockname()[1]}").startswith("not reachable (")
    assert doctor.reach("nonsense").startswith("not reachable (")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs(shell, capfd, monkeypatch) -> None:
    monkeypatch.setenv("_PRUNET_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", "prunet ins")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "prunet ins")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    code, out, _ = call(capfd)
    assert code == 0 and "inspect" in out and "estimate" not in out


def test_watch_shows_progress_and_writes_a_page_that_reloads(capsys, finished, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    now = look(run)
    assert (now.step, now.next, now.worker) == (None, [], None)
    steps = read_json(run / "steps.json")
    write_json(run / "steps.json", {key: steps[key] for key in ("plan", "build", "cache")})
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("steps: 2\n", "steps: 10\n", 1))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with hold(run, "run"):
        before |= {run / ".prunet.lock": (run / ".prunet.lock").stat().st_mtime_ns}
        code, out, _ = call(capsys, "watch", run, "--json")
        now = json.loads(out.splitlines()[-1])
        assert code == 0 and "process" in now["worker"]
        assert (now["step"], now["done"], now["of"]) == ("stage-1", 2, 10)
        assert now["next"] == ["evaluate", "export", "report"]
        assert now["seconds"] == pytest.approx(8 * 2 / now["last"]["images_per_s"])
        assert now["sheet"].endswith("step-0000002.png") and now["devices"][0]["total"] > 0
        write_live(run, look(run), [("left", "1 h")], tmp_path / "live.html", 5)
    page = (tmp_path / "live.html").read_text()
    assert 'http-equiv="refresh" content="5"' in page and "stage-1, 2 of 10 steps" in page and "data:image/" in page
    code, out, _ = call(capsys, "watch", run, "--page", tmp_path / "live.html")  # no process works there any more
    assert code == 0 and "resumes it" in out and "refresh" not in (tmp_path / "live.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (tmp_path / "mine.html").write_text("a page of the user's")
    assert call(capsys, "watch", run, "--page", tmp_path / "mine.html")[0] == 2
    assert call(capsys, "watch", tmp_path)[0] == 2
