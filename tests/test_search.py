"""Plans for a budget: the choice equals brute force, plans keep the budget, searches resume, mistakes are one line."""

import itertools
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from test_blocks import make_folder
from test_cli import call

from prunet import Runtime, Teacher, UserError, derive, load_plan, load_recipe
from prunet.cli.views import search_view
from prunet.console import results
from prunet.data.cache import Cache
from prunet.denoisers.patterns import is_within
from prunet.disk.files import read_json, write_json
from prunet.plan.plan import Plan
from prunet.report.search import write_search
from prunet.search import recovery, search
from prunet.search.budgets import costs_of, parse_budgets
from prunet.search.choice import Problem, best_sets, smallest_failing, total
from prunet.search.outcome import write_plan
from prunet.search.recovery import learning_rate_for, recover
from prunet.search.scores import Scores, key_of
from prunet.search.search import find_plan
from prunet.search.sensitivity import open_examples
from prunet.search.space import Space

CPU = ("--device", "cpu", "--precision", "no")
RUNTIME = Runtime(device="cpu", precision="no")


@pytest.mark.parametrize("seed", range(6))
def test_choice_is_that_of_brute_force(seed) -> None:
    rng = np.random.default_rng(seed)
    n = 9
    problem = Problem(
        hurts=rng.lognormal(0, 3, n),
        savings={"parameters": rng.uniform(0, 0.2, n), "macs": rng.uniform(-0.02, 0.2, n)},
        needs={"parameters": 0.3, "macs": 0.25},
        pairs={(i, j): rng.normal(0, 0.3) for i, j in itertools.combinations(range(n), 2) if rng.random() < 0.2},
        exclude=[frozenset(pair) for pair in itertools.combinations(range(n), 2) if rng.random() < 0.1],
    )
    # Some sets fail for reasons that no sum of costs shows: a whole group together, or one particular set.
    group = frozenset((2, 5, 7))
    alone = frozenset((0, 1, 3, 4))

    def refusal(chosen):
        return group if group <= chosen else alone if chosen == alone else None

    every = [frozenset(s) for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
    keeps = [
        s
        for s in every
        if all(sum(problem.savings[kind][i] for i in s) >= need for kind, need in problem.needs.items())
        and not any(pair <= s for pair in problem.exclude)
        and refusal(s) is None
    ]
    expected: list[frozenset[int]] = []
    for chosen in sorted(keeps, key=lambda s: total(problem, s)):
        if not any(other <= chosen for other in expected):
            expected.append(chosen)
    found = best_sets(problem, refusal, 5)
    assert [total(problem, s) for s in found] == pytest.approx([total(problem, s) for s in expected[:5]])
    assert found == expected[:5]


def test_nothing_fits_a_budget_that_all_units_together_miss() -> None:
    problem = Problem(np.ones(3), {"macs": np.array([0.1, 0.1, 0.1])}, {"macs": 0.4})
    assert best_sets(problem, lambda chosen: None, 3) == []


def test_failing_sets_are_made_as_small_as_possible() -> None:
    bad = {2, 5}
    assert smallest_failing(frozenset(range(8)), lambda some: bad <= set(some)) == bad


@pytest.mark.parametrize(
    ("text", "amount", "is_share"),
    [
        ("parameters=50%", 0.5, True),
        ("macs=12.5 %", 0.125, True),
        ("macs=200G", 2e11, False),
        ("size=1GB", 1e9, False),
        ("size=512MiB", 2**29, False),
        ("latency=40ms", 40, False),
        ("parameters=8.3M", 8.3e6, False),
    ],
)
def test_budgets_are_read(text, amount, is_share) -> None:
    (budget,) = parse_budgets([text])
    assert (budget.amount, budget.is_share) == (pytest.approx(amount), is_share)
    assert budget.limit({budget.kind: 10.0}) == pytest.approx(10 * amount if is_share else amount)


def test_a_plan_says_which_budgets_are_shares_of_the_teachers() -> None:
    budgets = parse_budgets(["size=300MB", "macs=60%"])
    best = SimpleNamespace(after={}, error=SimpleNamespace(value=0.25))
    said = search._described(SimpleNamespace(form=None, budgets=budgets), best)
    assert said == "found for 300 MB, MACs 60 % of the teacher's: error 0.25 before training"


@pytest.fixture(scope="module")
def space(sd) -> Space:
    outer = ["down_blocks.[012]", "up_blocks.[123]"]  # keep these, so that there are few units
    return Space(Teacher(sd), parse_budgets(["parameters=75%"]), outer)


@pytest.fixture(scope="module")
def searched(space, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        for name, few in (("MOST_PLANS", 3), ("MOST_PAIRS", 3), ("POINTS", 3)):
            patch.setattr(search, name, few)
        plan, result = find_plan(space, folder, RUNTIME, prompts=["a cat", "a dog"])
        write_plan(plan, result, folder)
        yield folder, plan, result


def test_the_plan_keeps_the_budget_and_hurts_least(space, searched) -> None:
    folder, plan, result = searched
    derived = derive(space.config, load_plan(folder / "plan.yaml"))
    assert derived.removed == derive(space.config, plan).removed
    assert all(derived.pairs(level) for level in derived.architecture.levels)  # so that a run can train it
    costs = costs_of(derived.student_size)
    assert costs["parameters"] <= 0.75 * space.costs["parameters"] == result.limits["parameters"]
    scores = Scores(space.teacher, open_examples(space.teacher, ["a cat", "a dog"]))
    assert scores.error(derived).value == pytest.approx(result.plans[0].error)
    assert result.plans[0].error == min(row.error for row in result.plans)
    within = [row for row in result.presets if row.costs["parameters"] <= result.limits["parameters"]]
    assert {row.name for row in result.presets} >= {"bk-base", "bk-small", "bk-tiny"}
    assert all(result.plans[0].error <= row.error for row in within)


def test_the_page_shows_errors_after_training(searched, tmp_path) -> None:
    result = searched[2]
    first, *others = result.plans
    first = first.model_copy(update={"after": {25: 0.7071, 100: 0.6262}})
    trained = result.model_copy(update={"plans": [first, *others], "recover_steps": 100})
    write_search(trained, tmp_path)
    page = (tmp_path / "search.html").read_text()
    assert "error after 100 steps" in page and "0.71 <small>(25)</small>, 0.63 <small>(100)</small>" in page


def test_the_recipe_can_be_run(searched, sd, tmp_path) -> None:
    folder, plan, result = searched
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.plan.remove == plan.remove
    assert Path(recipe.teacher.source) == sd and Path(recipe.output) == folder / "run"
    assert yaml.safe_load((folder / "plan.yaml").read_text())["remove"] == list(plan.remove)
    assert "give your\n# pictures with captions, or your prompts" in (folder / "recipe.yaml").read_text()
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    write_plan(plan, result, tmp_path, prompts=tmp_path / "mine.txt")
    text = (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").data.prompts == str(tmp_path / "mine.txt") and "give your" not in text


def test_the_recipe_follows_that_of_the_run_it_is_given(searched, finished, tmp_path) -> None:
    _, plan, result = searched
    write_plan(plan, result, tmp_path, cache=finished)
    ours, theirs = load_recipe(tmp_path / "recipe.yaml"), load_recipe(finished / "recipe.yaml")
    assert ours.plan.remove == plan.remove and Path(ours.cache or "") == finished / "cache"
    assert (ours.data, ours.evaluation, len(ours.stages)) == (theirs.data, theirs.evaluation, len(theirs.stages))
    assert ours.stages[0].steps == theirs.stages[0].steps
    assert ours.stages[0].learning_rate < theirs.stages[0].learning_rate


def test_a_resumed_search_equals_an_uninterrupted_one(space, searched, tmp_path, monkeypatch) -> None:
    folder, plan, result = searched
    keep, count = Scores.keep, itertools.count()

    def stop(self, *what):
        if next(count) == 11:
            raise KeyboardInterrupt
        keep(self, *what)

    monkeypatch.setattr(Scores, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        find_plan(space, tmp_path, RUNTIME, prompts=["a cat", "a dog"])
    before = len(read_json(tmp_path / "scores.json")["errors"])
    again = find_plan(space, tmp_path, RUNTIME, prompts=["a cat", "a dog"])
    assert before == 11 and next(count) > 12
    assert again == (plan, result)
    assert read_json(tmp_path / "scores.json") == read_json(folder / "scores.json")


def test_blocks_in_lists_for_a_budget_of_parameters(tmp_path, capsys) -> None:
    teacher = make_folder(tmp_path / "sd3", "SD3Transformer2DModel")
    given = ("search", teacher, "--budget", "parameters=70%", "--keep", "transformer_blocks.0", "-o", tmp_path / "out")
    code, out, _ = call(capsys, *given, *CPU)
    facts = read_json(tmp_path / "out" / "search.json")
    assert (
        code == 0
        and f"Build it: prunet build {teacher} --plan" in " ".join(out.split())  # it cannot be trained
        and not (tmp_path / "out" / "recipe.yaml").exists()
        and facts["plans"][0]["costs"]["parameters"] <= 0.7 * facts["costs"]["parameters"]
    )
    removed = derive(Teacher(teacher, only_form=True).unet_config, load_plan(tmp_path / "out" / "plan.yaml")).removed
    assert removed and not {"transformer_blocks.0", "transformer_blocks.4"} & removed.keys()
    page = (tmp_path / "out" / "search.html").read_text()
    assert "Cost against error" in page and 'circle class="chosen"' in page


def test_latency_is_timed_and_keeps_its_budget(space, searched, tmp_path, monkeypatch) -> None:
    timed = copy(space)
    timed.budgets, timed.limits = parse_budgets(["latency=90%"]), {}
    shutil.copytree(searched[0], tmp_path / "copy")

    def latency(self, derived):
        return 50 * derived.student_size.parameters / derived.teacher_size.parameters

    monkeypatch.setattr(Scores, "latency", latency)
    monkeypatch.setattr(Scores, "teacher_latency", 50.0)
    _, result = find_plan(timed, tmp_path / "copy", RUNTIME, prompts=["a cat", "a dog"])
    assert result.limits == {"latency": pytest.approx(45)} and result.costs["latency"] == 50
    assert all(row.costs["latency"] <= 45 for row in result.plans)
    timed.budgets = parse_budgets(["latency=600s"])
    monkeypatch.setattr(search, "open_examples", lambda *_: pytest.fail("examples were drawn"))
    with pytest.raises(UserError, match=r"--budget 600,000 ms: the teacher has .* ms, which is within it"):
        find_plan(timed, tmp_path / "copy", RUNTIME, prompts=["a cat", "a dog"])


def test_students_recover_and_the_untrained_one_may_stay(space, finished, tmp_path, monkeypatch) -> None:
    scores = Scores(space.teacher, open_examples(space.teacher, ["a cat"], file=tmp_path / "examples"), tmp_path)
    students = [derive(space.config, load_plan(name)) for name in ("bk-base", "bk-small")]
    for name, value in {"FIRST": 0, "SHARE": 0.5, "LAST": 1}.items():  # presets are trained in any case
        monkeypatch.setattr(recovery, name, value)
    train, trained = recovery._train, []
    monkeypatch.setattr(recovery, "_train", lambda *given: trained.append(given[3].steps) or train(*given))
    found = recover(students, scores, finished, 2, tmp_path / "recovery", RUNTIME)
    assert sorted(sorted(steps) for steps in found.values()) == [[1], [1, 2]] and trained == [1, 1, 2]
    assert not list((tmp_path / "recovery").iterdir())  # checkpoints are deleted
    assert recover(students, scores, finished, 2, tmp_path / "recovery", RUNTIME) == found
    assert trained == [1, 1, 2]  # nothing was trained again
    longer = recover(students, scores, finished, 4, tmp_path / "recovery", RUNTIME)  # after fewer steps, too
    assert sorted(sorted(steps) for steps in longer.values()) == [[2], [2, 4]]
    other = replace(Cache.open(finished / "cache"), spec={"of": "other pictures"})
    monkeypatch.setattr(recovery, "Cache", SimpleNamespace(open=lambda _: other))
    # Scores of other samples are not taken for these. A student that diverges does not stop the search.
    monkeypatch.setattr(recovery, "_train", lambda student, *_: None if student is students[0] else [1.0])
    found = recover(students, scores, finished, 2, tmp_path / "recovery", RUNTIME)
    assert {key: list(steps) for key, steps in found.items()} == {key_of(students[1]): [1, 2]}
    later = []  # one that diverges after the first steps has no error after training
    monkeypatch.setattr(recovery, "_train", lambda *_: later.append(0) or ([1.0] if len(later) < 3 else None))
    assert len(recover(students, scores, finished, 8, tmp_path / "recovery", RUNTIME)) == 1 and len(later) == 3
    monkeypatch.setattr(recovery.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"--recover: no room for checkpoints of 2 students \(.*MB\).*1.00 MB free"):
        recover(students, scores, finished, 6, tmp_path / "recovery", RUNTIME)


def test_scores_of_another_noise_schedule_are_refused(searched, sd, tmp_path) -> None:
    folder = Path(shutil.copytree(searched[0], tmp_path / "search"))
    teacher = Path(shutil.copytree(sd, tmp_path / "teacher"))
    texts, file = ["a cat", "a dog"], folder / "examples.safetensors"
    kept = read_json(folder / "scores.json")
    schedule = kept["made_from"].pop("schedule")
    write_json(folder / "scores.json", kept)  # as older versions wrote it
    scores = Scores(Teacher(teacher), open_examples(Teacher(teacher), texts, file=file), folder)
    scores.keep("errors", "none", [0.0])
    assert read_json(folder / "scores.json")["made_from"]["schedule"] == schedule
    config = teacher / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.02"))
    with pytest.raises(UserError, match=r"schedule.beta_end 0.012, now 0.02: give another folder"):
        Scores(Teacher(teacher), open_examples(Teacher(teacher), texts, file=file), folder)


def test_scores_of_another_text_encoder_or_guidance_are_refused(searched, sd, tmp_path) -> None:
    folder = Path(shutil.copytree(searched[0], tmp_path / "search"))
    teacher = Path(shutil.copytree(sd, tmp_path / "teacher"))
    texts, file = ["a cat", "a dog"], folder / "examples.safetensors"
    Scores(Teacher(teacher), open_examples(Teacher(teacher), texts, file=file), folder)
    with pytest.raises(UserError, match=r"guidance 7.5, now 3.0: give another folder"):
        Scores(Teacher(teacher), open_examples(Teacher(teacher), texts, file=file, guidance_scale=3.0), folder)
    config = teacher / "text_encoder" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"examples of another search: pipeline"):
        open_examples(Teacher(teacher), texts, file=file)
    file.unlink()
    with pytest.raises(UserError, match=r"scores of another search: pipeline"):
        Scores(Teacher(teacher), open_examples(Teacher(teacher), texts, file=file), folder)


def test_an_error_after_fewer_steps_is_not_compared(space, searched, finished, tmp_path, monkeypatch) -> None:
    """A student that was dropped counts by its error before training."""
    folder = Path(shutil.copytree(searched[0], tmp_path / "search"))

    def recovered(students, *_):
        dropped, *others = map(key_of, students)
        return {dropped: {1: 0.0}} | {key: {1: 2.0, 4: i * 1e-9} for i, key in enumerate(others[:2])}

    monkeypatch.setattr(search, "recover", recovered)
    given = {"prompts": ["a cat", "a dog"], "cache": finished, "recover_steps": 4}
    _, result = find_plan(space, folder, RUNTIME, **given)
    assert [4 in row.after for row in result.plans[:3]] == [True, True, False]


def test_a_plan_chosen_by_a_large_error_says_so(searched, tmp_path, capsys) -> None:
    _, plan, result = searched
    broken = result.model_copy(update={"error_before": 0.33})
    assert broken.is_broken and not result.model_copy(update={"error_before": 0.064}).is_broken
    trained = [broken.plans[0].model_copy(update={"after": {100: 0.3}}), *broken.plans[1:]]
    assert not broken.model_copy(update={"plans": trained}).is_broken
    write_plan(plan, broken, tmp_path)
    write_search(broken, tmp_path)
    results.print(search_view(broken, tmp_path))
    shown = [(tmp_path / "recipe.yaml").read_text(), (tmp_path / "search.html").read_text(), capsys.readouterr().out]
    assert all("an output of zeros" in " ".join(text.replace("\n# ", " ").split()) for text in shown)


ALTERNATIVES = {  # other plans of the form of a preset, for the small teachers
    "bk-tiny": [
        *("mid_block", "down_blocks.3", "up_blocks.0", "down_blocks.0.{attentions,resnets}.0"),
        *("down_blocks.[12].{attentions,resnets}.1", "up_blocks.[12].{attentions,resnets}.1"),
        "up_blocks.3.{attentions,resnets}.2",
    ],
    "vega": [
        *("mid_block.attentions.0", "mid_block.resnets.0", "*_blocks.1.attentions.0.transformer_blocks.0"),
        *("*_blocks.1.attentions.[12].transformer_blocks.1", "down_blocks.2.attentions.1.transformer_blocks.[02-8]"),
        *("down_blocks.2.attentions.0.transformer_blocks.[2-9]", "up_blocks.0.attentions.*.transformer_blocks.[1-79]"),
    ],
}


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_of_one_form_the_plan_that_hurts_least_is_found(name, request) -> None:
    """If only other parts than an alternative's hurt, the alternative is found; all plans have the preset's form."""
    teacher = Teacher(request.getfixturevalue("sd" if name == "bk-tiny" else "sdxl_deep"))
    space = Space(teacher, [], form=load_plan(name))
    alternative = derive(space.config, Plan("other", tuple(ALTERNATIVES[name])))
    assert alternative.student_config == derive(space.config, load_plan(name)).student_config
    hurts = [0.01 if all(is_within(part, alternative.removed) for part in unit.parts) else 1.0 for unit in space.units]
    found = [space.together(chosen) for chosen in best_sets(space.problem(hurts), space.refusal(space.limits), 4)]
    assert set(found[0].weight_map.values()) == set(alternative.weight_map.values())
    assert len({key_of(one) for one in found}) == 4
    assert all(one.student_config == alternative.student_config for one in found)


def test_programs_that_load_only_the_teacher_are_named(searched, tmp_path, capsys) -> None:
    _, plan, result = searched
    assert not result.warnings or "does not load" not in " ".join(result.warnings)  # its teacher does not load, either
    whole = derive(
        Teacher("sdxl").unet_config,
        Plan(
            "found", ("down_blocks.2.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0")
        ),
    )
    lost = result.model_copy(update={"teacher_config": whole.teacher_config, "plan": whole.result()})
    (said,) = [text for text in lost.warnings if "does not load" in text]
    assert "ComfyUI, single file and stable-diffusion.cpp, single file. With --form" in said
    preset = derive(whole.teacher_config, load_plan("vega"))
    assert not any("does not load" in text for text in lost.model_copy(update={"plan": preset.result()}).warnings)
    write_plan(plan, lost, tmp_path)
    results.print(search_view(lost, tmp_path))
    shown = [(tmp_path / "recipe.yaml").read_text(), capsys.readouterr().out]
    assert all("does not load in ComfyUI" in " ".join(text.replace("\n# ", " ").split()) for text in shown)


def test_each_learning_rate_of_a_run_is_lowered(searched, finished, tmp_path) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["stages"] = [{**recipe["stages"][0], "learning_rate": rate} for rate in (1e-3, 1e-4)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = searched[2].model_copy(update={"error_before": 0.04})
    write_plan(searched[1], result, tmp_path, cache=tmp_path / "run")
    stages = load_recipe(tmp_path / "recipe.yaml").stages
    assert [stage.learning_rate for stage in stages] == pytest.approx([2e-4, 2e-5])


def test_a_good_student_gets_a_small_learning_rate() -> None:
    rates = [learning_rate_for(error, 1e-3) for error in (0.0, 1e-4, 0.01, 0.65, 1.0, 5.0)]
    assert rates == sorted(rates) and rates[-1] == rates[-2] == 1e-3 and 0 < rates[0] < rates[1] < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--budget: give at least one, or a --form: parameters=50%"),
        (["--form", "bk-tiny", "--budget", "macs=60%"], "--form, --budget: a form says what the student costs"),
        (["--form", "vega"], "--form vega: Pattern"),
        (["--budget", "macs"], "--budget macs: write one of parameters=50%"),
        (["--budget", "vram=1GB"], "--budget vram=1GB: write one of"),
        (["--budget", "macs=sixty%"], "give a number and %, k, M, G, T, such as macs=50%"),
        (["--budget", "size=3GHz"], "give a number and %, B, kB, MB"),
        (["--budget", "macs=120%"], "more than nothing and less than the teacher"),
        (["--budget", "macs=0%"], "more than nothing and less than the teacher"),
        (["--budget", "macs=50%", "--budget", "macs=60%"], "two budgets of macs"),
        (["--budget", "parameters=900G"], "which is within it: give less"),
        (["--budget", "parameters=1%", "--keep", "*_blocks.[12]", "--keep", "down_blocks.0"], "no plan keeps"),
        (["--budget", "macs=80%", "--keep", "mid_blok"], "--keep: Pattern 'mid_blok' matches no module"),
        (["--budget", "macs=80%", "--recover", "5"], "give a run or a cache with --cache"),
        (["--budget", "macs=8G", "--recover", "5", "--cache", "a", "--micro-batch", "3"], "choose 1, 2, 4, 8, 16"),
        (["--budget", "macs=80%", "--cache", "nowhere"], "nowhere: no finished cache there"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(given, message, sd, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Teacher, "unet", property(lambda self: pytest.fail("weights were read")))
    code, _, err = call(capsys, "search", sd, *given, "-o", tmp_path / "out")
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
    assert message in lines[0]


@pytest.mark.slow
def test_costs_of_a_full_size_are_known_in_a_minute() -> None:
    space = Space(Teacher("sd-v1"), parse_budgets(["macs=70%", "parameters=60%"]))
    assert len(space.units) == 23
    with pytest.raises(UserError, match="no plan keeps"):
        Space(Teacher("sd-v1"), parse_budgets(["macs=10%"]))
