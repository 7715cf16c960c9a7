"""An ablation's runs equal those of `prunet run`; its table equals their files."""

import json
import math
import multiprocessing
import shutil
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import yaml

from prunet.disk.ownership import hold
from prunet.errors import UserError
from prunet.evaluation.results import EvaluationResult
from prunet.intervals import summary
from prunet.recipe.recipe import Recipe
from prunet.runs.ablation import ablate, collect, load_ablation
from prunet.runs.ablation_table import MEASURES, AblationResult, Arm, SharedProtocol, markdown, shared_protocol
from prunet.runs.run import Run, run
from prunet.runtime import Runtime
from prunet.student.folder import load_unet
from prunet.student.student import state_hash
from prunet.teacher.teacher import Teacher

CPU = Runtime(device="cpu", precision="no")


def write_ablation(folder: Path, sd: Path, pictures: Path) -> Path:
    stage = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-3, "ema_decay": None}
    recipe = {
        "teacher": str(sd),
        "plan": "bk-small",
        "data": {"source": str(pictures), "limit": 4},
        "stages": [stage],
        "evaluation": {"prompts": ["a cat", "a dog"], "steps": 1, "guidance_scale": 0},
        "sheet": {"every": 0},
        "output": "unused",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ablation = {
        "recipe": str(folder / "recipe.yaml"),
        "seeds": [1, 2],
        "arms": {
            "random": {"initialisation": "random", "stages.0.losses": {"output": 0, "feature": 0}},
            "inherited, all losses": {},
        },
        "output": str(folder / "out"),
    }
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    return folder


@pytest.fixture
def files(tmp_path: Path, sd: Path, pictures: Path) -> Path:
    return write_ablation(tmp_path, sd, pictures)


@dataclass
class Resumed:
    """An ablation that was stopped after its first arm and resumed."""

    files: Path
    before: dict[Path, int]
    result: AblationResult
    unets_loaded: int

    def recipes(self) -> dict[tuple[str, int], Recipe]:
        return load_ablation(self.files / "ablation.yaml")[1]


def stop_after_the_first_arm(files: Path) -> dict[Path, int]:
    """Returns the modification times of the weights that it leaves."""
    ablation, recipes = load_ablation(files / "ablation.yaml")
    first = {key: recipe for key, recipe in recipes.items() if key[0] == "random"}
    ablate(ablation.model_copy(update={"arms": {"random": ablation.arms["random"]}}), first, CPU)
    return {path: path.stat().st_mtime_ns for path in (files / "out").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, sd: Path, pictures: Path) -> Resumed:
    files = write_ablation(tmp_path_factory.mktemp("ablation"), sd, pictures)
    before = stop_after_the_first_arm(files)
    real, loaded = Teacher.unet, []
    counted = cached_property(lambda teacher: loaded.append(teacher) or real.func(teacher))
    counted.__set_name__(Teacher, "unet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "unet", counted)
        result = ablate(*load_ablation(files / "ablation.yaml"), CPU)
    return Resumed(files, before, result, len(loaded))


def assert_resumed(files: Path, before: dict[Path, int], result: AblationResult) -> None:
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [arm.seeds for arm in result.arms.values()] == [[1, 2], [1, 2]]
    assert len(list((files / "out" / "caches").iterdir())) == 2  # one a seed, shared by the arms


def test_resumes_where_it_stopped(resumed: Resumed) -> None:
    assert_resumed(resumed.files, resumed.before, resumed.result)
    assert resumed.unets_loaded == 3  # one that all runs share, and one for each of two students that inherit


def test_table_equals_separate_runs(resumed: Resumed, tmp_path: Path) -> None:
    recipes, arms = resumed.recipes(), resumed.result.arms
    for arm, seed in (("random", 1), ("inherited, all losses", 2)):
        alone = recipes[arm, seed].model_copy(update={"output": str(tmp_path / arm), "cache": None})
        folder = run(alone, CPU, until="evaluate")
        expected = json.loads((folder / "evaluation" / "evaluation.json").read_text())["distance"]
        at = arms[arm].seeds.index(seed)
        for name, cell in arms[arm].measures.items():
            which, key = name.split("/")
            assert cell.values[at] == expected[which][key]
    students = {key: state_hash(load_unet(Path(recipe.output) / "student")) for key, recipe in recipes.items()}
    begun = {arm: {students[arm, seed] for seed in (1, 2)} for arm in arms}
    assert len(begun["random"]) == 2 and len(begun["inherited, all losses"]) == 1
    assert (resumed.files / "out" / "ablation.md").read_text() == markdown(resumed.result)


def test_evaluations_of_another_version_are_not_mixed(resumed: Resumed, tmp_path: Path) -> None:
    """Evaluations of prunet 0.2 gave the denoisers the noise of the pictures."""
    files = Path(shutil.copytree(resumed.files, tmp_path / "files"))
    for path in files.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(resumed.files), str(files)))
    ablation, recipes = load_ablation(files / "ablation.yaml")
    folder = Path(recipes["inherited, all losses", 2].output)
    runs = {key: Run(recipe, CPU) for key, recipe in recipes.items()}
    assert collect(ablation, runs) == resumed.result
    result = EvaluationResult.load(path := folder / "evaluation" / "evaluation.json")
    assert result.protocol.noise == "independent"
    result.model_copy(update={"protocol": result.protocol.model_copy(update={"noise": None})}).save(path)
    with pytest.raises(
        UserError, match=r"^prunet 0\.2 evaluated with other noise .*delete evaluation/ in .*all-losses/seed-2,"
    ):
        collect(ablation, runs)
    done = {runs[key].folder: EvaluationResult.load(runs[key].result_of("evaluate")) for key in runs}
    old = {folder: done[folder]}
    assert shared_protocol(old).noise is None  # a table of old ones alone
    with pytest.raises(UserError, match=r"^prunet 0\.2 evaluated with other noise"):
        shared_protocol(old, more=True)
    del done[folder]
    first, other = list(done)[:2]
    changed = done[other].protocol.model_copy(update={"precision": "bfloat16"})
    done[other] = done[other].model_copy(update={"protocol": changed})
    with pytest.raises(
        UserError, match=rf"^{other}: evaluated differently from {first} \(precision bfloat16, not float32\)"
    ):
        shared_protocol(done)


def test_arms_without_paths_use_the_cache_of_those_with_paths(files: Path) -> None:
    """Otherwise the teacher would draw or encode the same latents twice."""
    ablation = yaml.safe_load((files / "ablation.yaml").read_text())
    jumps = {"objective": "trajectory", "jumps": 1, "steps": 2, "batch_size": 2}
    weak, strong = ({**jumps, "guidance_scale": scale} for scale in (2, 5))
    size = {"steps": 2, "batch_size": 2}
    ablation["arms"] = {
        "none": {},
        "weak": {"stages": [size, weak]},
        "strong": {"stages": [size, strong]},
        "weak, then strong": {"stages": [weak, strong]},
        "weak, size, strong": {"stages": [weak, size, strong]},  # the third stage names the folder of its paths
        "other data": {"data.limit": 3},
    }
    (files / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    recipes = load_ablation(files / "ablation.yaml")[1]
    assert len(recipes) == 12
    for seed in (1, 2):
        cache = {arm: recipes[arm, seed].cache for arm, of in recipes if of == seed}
        assert cache["none"] == cache["weak"] == cache["weak, size, strong"]  # the first of the longest lists
        assert len(set(cache.values())) == 4  # strong paths alone begin another list, and other data have other latents
    assert len({recipe.cache for recipe in recipes.values()}) == 8  # none is shared by two seeds
    specs: dict[Path, list[dict]] = {}
    for recipe in recipes.values():
        for folder, spec in Run(recipe, CPU).path_specs.values():
            specs.setdefault(folder, []).append(spec)
    assert len(specs) == 10 and all(spec == same[0] for same in specs.values() for spec in same)


@pytest.mark.processes
def test_two_workers_resume_to_the_same_result(files: Path, resumed: Resumed) -> None:
    before = stop_after_the_first_arm(files)
    result = ablate(*load_ablation(files / "ablation.yaml"), CPU, workers=2)
    assert_resumed(files, before, result)
    assert result == resumed.result


@pytest.mark.processes
def test_a_run_that_fails_stops_the_others(files: Path) -> None:
    """Queued runs do not start, and no running one continues in the background."""
    ablation, recipes = load_ablation(files / "ablation.yaml")
    endless = {"stages": [recipes["random", 1].stages[0].model_copy(update={"steps": 10**6})]}
    recipes = {key: recipe.model_copy(update=endless) for key, recipe in recipes.items()}
    broken, *others = (Run(recipe, CPU) for recipe in recipes.values())
    with hold(Path(ablation.output), "ablation"):
        broken.finish("build")
    weights = broken.folder / "student" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")  # the worker notices it when it reads them
    with pytest.raises(UserError, match=r"safetensors: damaged or changed"):
        ablate(ablation, recipes, CPU, workers=2)
    assert not multiprocessing.active_children()
    assert not any(other.is_done("stage-1") for other in others)


def test_a_common_first_stage_is_trained_once(files: Path) -> None:
    """The copy equals what the second arm would have trained, and that arm's next stage starts from it."""
    stage = yaml.safe_load((files / "recipe.yaml").read_text())["stages"][0]
    ablation = yaml.safe_load((files / "ablation.yaml").read_text())
    ablation |= {"seeds": [1], "arms": {"one stage": {}, "two stages": {"stages": [stage, stage | {"steps": 1}]}}}
    (files / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    loaded, recipes = load_ablation(files / "ablation.yaml")
    ablate(loaded, recipes, CPU)
    one, two = (Path(recipes[arm, 1].output) for arm in loaded.arms)
    name = "stage-1/unet/diffusion_pytorch_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / "stage-1" / "checkpoints").is_dir() and not (two / "stage-1" / "checkpoints").exists()
    alone = run(recipes["two stages", 1].model_copy(update={"output": str(files / "alone")}), CPU, until="evaluate")
    assert (alone / "stage-1" / "checkpoints").is_dir()
    name = "stage-2/unet/diffusion_pytorch_model.safetensors"
    assert (alone / name).read_bytes() == (two / name).read_bytes()


def test_interval_is_student_t() -> None:
    found = summary([1.0, 2.0, 4.0])
    # From the definition; 4.303 is t(0.975, 2 degrees of freedom) in any table.
    assert found.interval == pytest.approx(4.303 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3))
    assert summary([1.0]).interval is None


def test_students_that_draw_otherwise_are_not_compared_by_their_denoisers() -> None:
    """Students without guidance or with few steps are not meant to give the teacher's output of a call."""
    few = "ddim-trailing, 4 steps, no guidance"
    measures = {f"{which}/{key}": summary([0.5]) for which, key in MEASURES}
    jumps = measures | {"after/denoiser": summary([]), "after/picture": summary([0.25])}
    arms = {"plain": Arm(seeds=[1], parameters=10, measures=measures)}
    arms["jumps"] = Arm(seeds=[1], parameters=10, measures=jumps, drawn=few)
    protocol = SharedProtocol(size=16, steps=25, guidance_scale=7.5, sampler="ddim", prompts=["a"])
    text = markdown(AblationResult(title="T", arms=arms, protocol=protocol))
    assert "| plain | 0.00 | 1 | **0.5000** | **0.5000** | **0.5000** | 0.5000 |" in text
    assert "| jumps | 0.00 | 1 | **0.5000** |  | **0.5000** | **0.2500** |" in text
    assert f"made for in jumps: {few}." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": {"stages.0.stepz": 1}}}, "arm 'a'.*unknown key 'stages.0.stepz'; did you mean 'steps'"),
        ({"arms": {"a": {"stages.3.steps": 1}}}, "arm 'a'.*'stages.3.steps': the recipe has no '3' at that place"),
        ({"arms": {"a": {}, "A ": {}}}, "would share one folder"),
        ({"arms": {"a": {}, "b": {"evaluation.steps": 3}}}, "arms 'a' and 'b' differ in evaluation"),
        ({"armz": {}}, "unknown key 'armz'; did you mean 'arms'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": [True]}, "seeds"),
        ({"seeds": [2**70]}, "seeds"),
        ({"output": ""}, "output"),
        ({"arms": {"a": {}, "b": {"data.size": 8}}}, "differ in data.size"),
        ({"arms": {"a": {}, "b": {"stages.0.teacher": "other"}}}, "differ in teacher"),
        ({"arms": {"a": {"seed": 3}}}, "'seed' is set for each run"),
        ({"arms": {"a": {"seed ": 3}}}, "'seed' is set for each run"),
        ({"arms": {"a": {}, "b": {"plan": "bk-small"}}}, "'a' and 'b' are the same recipe"),
    ],
)
def test_bad_ablations_are_refused(files: Path, change: dict, message: str) -> None:
    path = files / "ablation.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_ablation(path)


def test_overrides_cannot_give_all_runs_one_seed(files: Path) -> None:
    with pytest.raises(UserError, match="'seed' is set for each run"):
        load_ablation(files / "ablation.yaml", ["seed=5"])


def test_an_arm_given_twice_is_refused(files: Path) -> None:
    (files / "ablation.yaml").write_text("recipe: recipe.yaml\noutput: out\narms:\n  a: {}\n  a: {plan: bk-tiny}\n")
    with pytest.raises(UserError, match="'a' is given twice"):
        load_ablation(files / "ablation.yaml")


def test_more_runs_than_can_be_checked_are_refused(files: Path) -> None:
    path = files / "ablation.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seeds": list(range(400))}))
    with pytest.raises(UserError, match="runs, arms times seeds, are more than 500"):
        load_ablation(path)
