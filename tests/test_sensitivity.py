"""Units are the smallest sets that can be removed; the error of each removal is measured, stored and shown."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_blocks import SMALL, config_of, make_folder
from test_cli import call

from prunet import Plan, Teacher, UserError, derive, load_plan
from prunet.data.cache import Cache
from prunet.denoisers.known import architecture_of
from prunet.diagram import STEPS
from prunet.disk.files import read_json, write_json
from prunet.report.sensitivity import chart, coloured_diagram
from prunet.search import examples
from prunet.search.examples import MOST, cache_examples
from prunet.search.scores import Scores
from prunet.search.sensitivity import check_samples, open_examples, sensitivity
from prunet.search.units import find_units, patterns_of

CPU = ("--device", "cpu", "--precision", "no")


@pytest.fixture(scope="module", params=["sdxl", "SD3Transformer2DModel", "ZImageTransformer2DModel"])
def config(request):
    if request.param in SMALL:
        return config_of(request.param)
    return Teacher(request.getfixturevalue(request.param)).unet_config


@pytest.fixture(scope="module")
def units(config):
    return find_units(config)


def goes(config, parts) -> bool:
    try:
        return bool(derive(config, Plan("p", tuple(parts))))
    except UserError:
        return False


def test_no_smaller_set_of_a_units_parts_can_go(config, units) -> None:
    assert len({unit.name for unit in units}) == len(units) > 2
    for unit in units:
        assert goes(config, patterns_of(unit.parts))
        smaller = [s for n in range(1, len(unit.parts)) for s in itertools.combinations(unit.parts, n)]
        assert not any(goes(config, parts) for parts in smaller)


def test_every_part_that_can_go_alone_is_a_unit(config, units) -> None:
    alone = {unit.parts[0] for unit in units if len(unit.parts) == 1}
    parts = derive(config, Plan("none")).architecture.parts(config)
    assert alone == {part for part in parts if goes(config, [part])}


def test_units_of_presets_are_found(sd) -> None:
    config = Teacher(sd).unet_config
    removed = set(derive(config, load_plan("bk-tiny")).removed)
    inside = [set(unit.parts) for unit in find_units(config) if set(unit.parts) <= removed]
    assert {"mid_block"} in inside and {"down_blocks.3", "up_blocks.0"} in inside
    assert set().union(*inside) == removed


def test_patterns_name_exactly_their_parts(config, units) -> None:
    architecture = derive(config, Plan("none")).architecture
    parts = [part for unit in units for part in unit.parts]
    for chosen in (parts, parts[::2], parts[:3], parts[-5:]):
        chosen = sorted(set(chosen))
        assert sorted(architecture.removed_parts(config, patterns_of(chosen))) == chosen


def test_kept_parts_are_in_no_unit(sd) -> None:
    config = Teacher(sd).unet_config
    units = find_units(config, ["mid_block", "down_blocks.0.{attentions,resnets}.1"])
    gone = {part for unit in units for part in unit.parts}
    assert not any(part.startswith(("mid_block", "down_blocks.0.attentions.1")) for part in gone)
    assert not {"down_blocks.0", "down_blocks.0.resnets.1"} & gone
    assert any(part.startswith("down_blocks.1.attentions") for part in gone)
    with pytest.raises(UserError, match=r"--keep: Pattern 'mid_bloc' matches no module .* nearest part is mid_block"):
        find_units(config, ["mid_bloc"])


@pytest.fixture(scope="module", params=["sd", "SD3Transformer2DModel"])
def scored(request, tmp_path_factory):
    """A teacher, some of its units with their errors, and the folder with the scores."""
    folder = tmp_path_factory.mktemp("scores")
    if request.param in SMALL:
        teacher = Teacher(make_folder(folder / "teacher", request.param), only_form=True)
    else:
        teacher = Teacher(request.getfixturevalue(request.param))
    units = find_units(teacher.unet_config)[::8]
    scores = Scores(teacher, open_examples(teacher, ["a cat", "a dog"]), folder)
    return teacher, units, sensitivity(units, scores), folder


def test_removing_nothing_has_no_error(scored) -> None:
    teacher, units, result, folder = scored
    scores = Scores(teacher, open_examples(teacher, ["a cat", "a dog"]), folder)
    nothing = scores.error(derive(teacher.unet_config, Plan("none")))
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    for unit, row in zip(units, result.units, strict=True):
        assert 0 < row.low <= row.error <= row.high
        assert row.saves["parameters"] == unit.derived.teacher_size.parameters - unit.derived.student_size.parameters
        assert row.saves["size"] == 2 * row.saves["parameters"]


def test_scores_are_measured_once(scored, monkeypatch) -> None:
    teacher, units, result, folder = scored
    scores = Scores(teacher, open_examples(teacher, ["a cat", "a dog"]), folder)
    monkeypatch.setattr("prunet.search.scores.sharing", lambda *_: pytest.fail("measured again"))
    assert sensitivity(units, scores) == result
    if not teacher.architecture.only_form:
        with pytest.raises(UserError, match="scores of another search: prompts"):
            Scores(teacher, open_examples(teacher, ["a fox"]), folder)


def test_the_diagram_shows_the_least_error_of_a_part(scored) -> None:
    _, units, result, _ = scored
    parts = {p.name: p for s in coloured_diagram(result).sections for layer in s.layers for p in layer}
    errors = {unit.name: row.error for unit, row in zip(units, result.units, strict=True)}
    for unit in units:
        for part in set(unit.parts) & parts.keys():
            least = min(errors[other.name] for other in units if part in other.parts)
            assert parts[part].error <= least
            assert parts[part].colour == sum(parts[part].error >= step for step in STEPS)
    assert chart(result).count('class="row"') == len(units)


def test_inspect_shows_it(sd, tmp_path, capsys, monkeypatch) -> None:
    units = [unit for unit in find_units(Teacher(sd).unet_config) if "mid_block" in unit.name]
    monkeypatch.setattr("prunet.search.units.find_units", lambda config: units)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = ("inspect", sd, "--sensitivity", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out", *CPU)
    code, out, _ = call(capsys, *given, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0 and len(facts["units"]) == len(units)
    code, out, _ = call(capsys, *given)  # resumes: nothing is measured again
    assert code == 0 and "mid_block" in out and "below 0.001" in out
    assert read_json(tmp_path / "out" / "sensitivity.json") == facts
    page = (tmp_path / "out" / "sensitivity.html").read_text()
    assert 'class="part resnet colour-' in page and "mid_block" in page
    assert (tmp_path / "out" / "sensitivity.md").read_text().count("\n| ") == len(facts["units"])


@pytest.mark.parametrize("count", [29, 58, 64, 200])
def test_each_noise_level_comes_once_for_any_number_of_samples(sd, finished, monkeypatch, count) -> None:
    teacher, samples = Teacher(sd), Cache.open(finished / "cache")
    more = dataclasses.replace(samples, groups=([number % 12 for number in range(count)],))
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "check", lambda *_: None)
        examples = cache_examples(teacher, more)
    steps = torch.cat([call(lambda noisy, t, **_: (t.view(-1, 1, 1, 1).expand_as(noisy),)) for call in examples.calls])
    levels = min(count, MOST)
    assert [int(step * levels / 1000) for step in steps[:, 0, 0, 0].round().sort().values] == list(range(levels))


def test_a_cache_gives_its_samples_with_noise_of_all_levels(sd, finished) -> None:
    teacher, samples = Teacher(sd), Cache.open(finished / "cache")
    examples = open_examples(teacher, cache=finished)
    assert len(examples.groups) == len(set(examples.groups)) == len(samples) == 12
    # With guidance, a net whose output is its prompt returns the guided prompt.
    noisy = torch.cat([call(lambda noisy, *_, **__: (noisy,)) for call in examples.calls]).flatten(1)
    steps = torch.cat([call(lambda noisy, t, **_: (t.view(-1, 1, 1, 1).expand_as(noisy),)) for call in examples.calls])
    steps, latents = steps[:, 0, 0, 0].round(), torch.stack([samples.sample(i).mean for i in range(12)]).flatten(1)
    assert [int(step * 12 / 1000) for step in steps.sort().values] == list(range(12))
    alphas = teacher.noise_scheduler.alphas_cumprod[steps.long()][:, None]
    noise = (noisy - alphas.sqrt() * latents) / (1 - alphas).sqrt()
    assert noise.std().item() == pytest.approx(1, abs=0.05) and abs(noise.mean().item()) < 0.05
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), latents.flatten()]))[0, 1].item()) < 0.06


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompts", "a.txt"], "are for --sensitivity"),
        (["--sensitivity", "--plan", "bk-small"], "leave --plan out"),
        (["--sensitivity", "--cache", "nowhere"], "nowhere: no finished cache there"),
        (["--sensitivity", "-o", "SD"], "--output"),
    ],
)
def test_mistakes_are_one_line(given, message, sd: Path, capsys) -> None:
    code, _, err = call(capsys, "inspect", sd, *(str(sd) if word == "SD" else word for word in given))
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_without_units_is_refused(sd, capsys, monkeypatch) -> None:
    monkeypatch.setattr("prunet.search.units.find_units", lambda _: [])
    code, _, err = call(capsys, "inspect", sd, "--sensitivity")
    assert code == 2 and "nothing can be removed" in err and err.count("\n") == 1


def test_a_cache_of_paths_is_refused(sd, finished, tmp_path) -> None:
    folder = Path(shutil.copytree(finished / "cache", tmp_path / "cache-paths"))
    write_json(folder / "spec.json", read_json(folder / "spec.json") | {"paths": {}})
    with pytest.raises(UserError, match="holds the teacher's paths, not samples: give the run instead"):
        check_samples(Teacher(sd), None, folder)


@pytest.mark.parametrize(
    ("name", "last"), [("SD3Transformer2DModel", 1000), ("FluxTransformer2DModel", 1), ("WanTransformer3DModel", 1000)]
)
def test_random_examples_have_the_times_of_the_pipeline_and_real_positions(name, last) -> None:
    inputs = architecture_of({"_class_name": name}).example_inputs(config_of(name), latent_size=(8, 8))
    ids = {key: value.clone() for key, value in inputs.items() if key.endswith("_ids")}
    times = []
    for number in range(20):
        given = {key: value.clone() for key, value in inputs.items()}
        examples._fill(given, torch.Generator().manual_seed(number))
        assert all(torch.equal(given[key], value) for key, value in ids.items())
        assert given["hidden_states"].std().item() == pytest.approx(1, abs=0.3)
        times.append(given["timestep"].item() / last)
    assert 0 <= min(times) < 0.3 < 0.7 < max(times) <= 1
    if ids:
        assert ids["img_ids"][:, 1:3].tolist() == [[row, column] for row in range(4) for column in range(4)]
