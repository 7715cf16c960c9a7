"""What a recipe would cost: the sums, and how often what is timed. Nothing is really timed here."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from prunet import Run, Runtime, cache, load_recipe
from prunet.data.paths import cache_paths
from prunet.recipe.stage import TeacherSource
from prunet.runs import estimate as costs
from prunet.runs.estimate import compared, estimate, memory
from prunet.training.fit import training_memory

CPU = Runtime(device="cpu", precision="no")
STAGE = {"steps": 3, "batch_size": 8, "losses": {"feature": 0}}


@pytest.fixture
def opened(sd: Path, pictures: Path, tmp_path: Path) -> Any:
    def make(*stages: dict[str, Any], runtime: Runtime = CPU) -> Run:
        value = {
            "teacher": str(sd),
            "plan": "bk-small",
            "data": {"source": str(pictures)},
            "stages": list(stages),
            "evaluation": {"prompts": ["a"]},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(value))
        return Run(load_recipe(tmp_path / "recipe.yaml"), runtime)

    return make


@pytest.fixture
def timed(monkeypatch) -> dict[str, Any]:
    """Replaces the timing: `seconds` gives the seconds per image of a plan and micro-batch, `asked` lists calls."""
    found: dict[str, Any] = {"asked": [], "seconds": lambda plan, count: 0.1}

    def seconds_per_image(derived, pairs, latent_size, batch_size, *_) -> float:
        found["asked"].append((derived.plan.name, bool(pairs), batch_size))
        return found["seconds"](derived.plan.name, batch_size)

    monkeypatch.setattr(costs, "seconds_per_image", seconds_per_image)
    monkeypatch.setattr(costs, "call_seconds", lambda this, count: 3600.0)  # drawing hours are the calls
    monkeypatch.setattr(costs, "step_memory", lambda *args, **options: 1000)
    return found


def test_hours_are_summed_over_all_stages(opened, timed) -> None:
    timed["seconds"] = lambda plan, count: {"bk-base": 0.3, "bk-small": 0.2}[plan]
    found = estimate(opened({**STAGE, "plan": "bk-base"}, STAGE, {**STAGE, "steps": 10}))
    assert found.images == (3 + 3 + 10) * 8
    assert found.checkpoint_bytes > 0
    seconds = 3 * 8 * 0.3 + 13 * 8 * 0.2
    assert found.distil_hours == pytest.approx(seconds / 3600)
    assert found.seconds_per_image == pytest.approx(seconds / found.images)
    assert set(found.steps) == {
        "plan",
        "build",
        "cache",
        "stage-1",
        "stage-2",
        "stage-3",
        "evaluate",
        "export",
        "report",
    }
    assert set(found.steps.values()) == {"to do"}


def test_equal_stages_are_timed_once_and_a_few_images_first(opened, timed) -> None:
    found = estimate(opened(STAGE, STAGE))
    assert timed["asked"] == [("bk-small", False, 4), ("bk-small", False, 8)]
    assert found.timed_micro_batch == found.micro_batch == 8


def test_what_would_take_long_is_timed_by_a_few_images(opened, timed) -> None:
    timed["seconds"] = lambda plan, count: 1.0  # 8 s for all of them
    found = estimate(opened(STAGE))
    assert timed["asked"] == [("bk-small", False, 4)]
    assert (found.timed_micro_batch, found.micro_batch) == (4, 8)


def test_features_are_compared_if_their_loss_has_weight(opened, timed) -> None:
    this = opened(STAGE, {**STAGE, "losses": {"feature": 1}})
    assert compared(this, 1) == () and compared(this, 2) == this.pairs(2) != ()
    estimate(this)
    assert {(pairs, count) for _, pairs, count in timed["asked"]} == {
        (pairs, n) for pairs in (False, True) for n in (4, 8)
    }


def test_memory_is_that_of_the_stage_that_needs_most(opened, timed) -> None:
    this = opened({**STAGE, "plan": "bk-base"}, STAGE)
    first, second = memory(this, 1), memory(this, 2)
    assert first["student"] > second["student"]
    found = estimate(this).memory_bytes
    assert found == {**first, "total": sum(first.values())}
    derived = this.steps_down[0]
    stage, configs = this.recipe.stages[0], (derived.teacher_config, derived.student_config)
    parts = training_memory(*configs, this.latent_size, 8, stage, this.runtime)
    assert {name: first[name] for name in parts.keys() - {"activations"}} == {
        name: parts[name] for name in parts.keys() - {"activations"}
    }
    assert first["student"] == 4 * derived.student_size.parameters and first["activations"] == 1000
    assert first["heap"] == (first["gradients"] + 1000) // 2


def test_text_that_is_embedded_while_training_costs_time_and_memory(opened, timed, sd) -> None:
    this = opened(STAGE)
    before = estimate(this)
    this = Run(this.recipe.model_copy(update={"data": this.recipe.data.model_copy(update={"text": "live"})}), CPU)
    found = estimate(this)
    assert found.cache_bytes_per_sample == {**before.cache_bytes_per_sample, "text": 0}
    encoder = sum(tensor.nbytes for tensor in load_file(sd / "text_encoder" / "model.safetensors").values())
    assert found.memory_bytes["text encoders"] == encoder
    assert found.text_seconds_per_image > 0 == before.text_seconds_per_image
    assert found.seconds_per_image == pytest.approx(before.seconds_per_image + found.text_seconds_per_image)


def test_finished_steps_are_listed_as_done(finished, timed) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    recipe = load_recipe(finished / "recipe.yaml", [f"output={json.dumps(str(finished))}"])
    assert set(estimate(Run(recipe, CPU)).steps.values()) == {"done"}
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_cache_has_the_estimated_size(kind, opened, timed, pictures, request, tmp_path) -> None:
    this = opened(STAGE)
    this = Run(
        this.recipe.model_copy(update={"teacher": TeacherSource(source=str(request.getfixturevalue(kind)))}), CPU
    )
    found = estimate(this)
    assert found.samples == len(list(pictures.glob("*.png")))
    assert found.cache_bytes == found.samples * sum(found.cache_bytes_per_sample.values())
    made = cache(this.teacher, this.recipe.data, tmp_path / "c")
    whole = made.folder / "shard-00000.safetensors"
    stored = {name: tensor.nbytes for name, tensor in load_file(whole).items()}
    latents = stored["mean"] + stored["std"]
    assert found.cache_bytes_per_sample["latents"] * len(made) == latents
    sizes = 2 * 6 * len(made) if kind == "sdxl" else 0  # six numbers in four bytes each, not in two
    assert found.cache_bytes_per_sample["text"] * len(made) == sum(stored.values()) - latents - sizes


def test_the_cache_of_paths_has_the_estimated_size(opened, timed) -> None:
    """It is often larger than that of latents; the second and the third stage share one."""
    jumps = {**STAGE, "objective": "trajectory", "guidance_scale": 2, "jumps": 2, "path_steps": 4}
    del jumps["losses"]
    this = opened(STAGE, jumps, {**jumps, "jumps": 1}, {**jumps, "paths": 5})
    found = estimate(this)
    latents = cache(this.teacher, this.recipe.data, this.cache_folder)
    folders = {folder: this.recipe.stages[number - 1] for number, (folder, _) in this.path_specs.items()}
    stored = 0
    for folder, stage in folders.items():
        cache_paths(this.teacher, latents, stage, folder)
        stored += sum(t.nbytes for file in folder.glob("shard-*") for t in load_file(file).values())
    assert len(folders) == 2 and found.path_bytes == stored
    assert estimate(opened(STAGE)).path_bytes == 0


def test_what_the_teacher_draws_takes_time(opened, timed, tmp_path) -> None:
    """The hours are those of the calls that really happen when latents and paths are drawn."""
    jumps = {**STAGE, "objective": "trajectory", "guidance_scale": 2, "jumps": 2, "path_steps": 4, "paths": 5}
    del jumps["losses"]
    pictures = opened(STAGE)
    data = {"source": None, "prompts": ["a", "b", "c"], "steps": 3}
    for guidance in (1.0, 2.0):
        this = opened(STAGE, jumps, {**jumps, "jumps": 1})
        drawn = this.recipe.data.model_copy(update={**data, "guidance_scale": guidance})
        this = Run(this.recipe.model_copy(update={"data": drawn}), CPU)
        expected, calls = estimate(this).drawing_hours, 0

        def counted(module, args, kwargs, output) -> None:
            nonlocal calls
            calls += len(kwargs["sample"] if "sample" in kwargs else args[0])

        hook = this.teacher.unet.register_forward_hook(counted, with_kwargs=True)
        latents = cache(this.teacher, drawn, tmp_path / f"cache-{guidance}", seed=this.recipe.seed)
        cache_paths(this.teacher, latents, this.recipe.stages[1], tmp_path / f"paths-{guidance}")
        hook.remove()
        assert expected == calls == 3 * 3 * guidance + 5 * 4 * 2
    assert estimate(pictures).drawing_hours == 0
    each = opened({key: value for key, value in jumps.items() if key != "paths"})
    assert estimate(each).drawing_hours == estimate(each).samples * 4 * 2


def test_only_what_is_not_drawn_yet_takes_time(opened, timed, monkeypatch) -> None:
    monkeypatch.setattr("prunet.data.paths.BLOCK", 2)
    monkeypatch.setattr(costs, "PATHS", 2)
    jumps = {**STAGE, "objective": "trajectory", "guidance_scale": 2, "jumps": 2, "path_steps": 4, "paths": 5}
    del jumps["losses"]
    this = opened(jumps)
    latents = cache(this.teacher, this.recipe.data, this.cache_folder, seed=this.recipe.seed)
    ((folder, _),) = this.path_specs.values()
    made = cache_paths(this.teacher, latents, this.recipe.stages[0], folder)
    assert estimate(opened(jumps)).drawing_hours == 0 and len(made) == 5
    for name in ("cache.json", "shard-00001.safetensors"):
        (folder / name).unlink()
    assert estimate(opened(jumps)).drawing_hours == (5 - 4) * 4 * 2


def test_the_time_of_a_call_is_for_one_picture(opened, monkeypatch) -> None:
    this, asked = opened(STAGE), []

    def times_in_turn(calls, repeats, device) -> dict[str, list[float]]:
        asked.extend(len(call()[0]) for call in calls.values())
        return {name: [500.0, 700.0] for name in calls}  # milliseconds

    monkeypatch.setattr(costs, "times_in_turn", times_in_turn)
    assert costs.call_seconds(this, 3) == pytest.approx(0.2) and asked == [3]
