"""Speeds beside their limits: parts add up to the whole, limits follow from the configs. No test asserts a time."""

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli import call
from torch import nn

from prunet import Teacher, UserError, build, export, load_plan
from prunet.disk.files import read_json
from prunet.plan.size import kind_of, macs_by_kind, size_of
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.report.speeds import chart, markdown, write_speeds
from prunet.sampling.draw import Model
from prunet.speed.bench import Bench, BenchModel, _pictures, bench
from prunet.speed.clock import times_in_turn
from prunet.speed.models import open_models
from prunet.speed.profiling import PARTS, times_by_kind

CPU = torch.device("cpu")
RUNTIMES = ("torch", "onnx")


@pytest.fixture(scope="module", autouse=True)
def one_round():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunet.speed.profiling.ROUNDS", 1)  # more rounds only reduce noise, which no test checks
        yield


@pytest.fixture(scope="module")
def student(sd, tmp_path_factory):
    teacher = Teacher(sd)
    return export(teacher, build(teacher, load_plan("bk-small")), tmp_path_factory.mktemp("students") / "small")


@pytest.fixture(scope="module")
def result(sd, student) -> Bench:
    pipelines = open_models([str(sd), str(student)], ["bk-tiny"])
    return bench(pipelines, batch_sizes=(1, 2), steps=7, repeats=3)


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def test_macs_by_kind_are_those_of_the_size(sd) -> None:
    config = Teacher(sd).unet_config
    kinds, size = macs_by_kind(config), size_of(config)
    assert kinds["convolution"] + kinds["matmul"] == size.macs
    assert kinds["attention"] == size.attention_macs
    larger = macs_by_kind(config, (16, 16))
    assert larger["convolution"] == 4 * kinds["convolution"]
    assert larger["attention"] > 4 * kinds["attention"]  # some of it grows with the square of the pixels


def test_operations_are_known_by_their_names() -> None:
    names = {
        "attention": "_scaled_dot_product_flash_attention_for_cpu baddbmm bmm _softmax _flash_attention_forward",
        "convolution": "conv2d cudnn_convolution mkldnn_convolution _convolution",
        "matmul": "mm addmm linear matmul",
        "normalisation": "native_group_norm layer_norm silu gelu",
        "other": "add copy_ _to_copy cat upsample_nearest2d mul empty _convert_indices_from_coo_to_csr",
    }
    for kind, operations in names.items():
        assert {name: kind_of(f"aten::{name}") for name in operations.split()} == dict.fromkeys(
            operations.split(), kind
        )
    assert kind_of("mkldnn::_linear_pointwise") == "matmul"
    assert kind_of("mkldnn::_convolution_pointwise") == "convolution"


def test_calls_take_turns(monkeypatch) -> None:
    monkeypatch.setattr("prunet.speed.clock.MOST_SECONDS", 60)
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = times_in_turn(calls, 4, CPU)
    assert "".join(seen) == "abc" * 5
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}
    monkeypatch.setattr("prunet.speed.clock.MOST_SECONDS", 0)
    assert {len(found) for found in times_in_turn(calls, 9, CPU).values()} == {3}


def test_the_profile_names_what_a_call_does() -> None:
    nets = {"convolution": nn.Conv2d(8, 8, 3), "matmul": nn.Linear(64, 64), "normalisation": nn.GroupNorm(4, 8)}
    inputs = {"convolution": (2, 8, 32, 32), "matmul": (32, 64), "normalisation": (2, 8, 32, 32)}
    calls = {kind: lambda kind=kind: nets[kind](torch.zeros(inputs[kind])) for kind in nets}
    found = times_by_kind(calls, dict.fromkeys(calls, 5.0), CPU)
    for kind, parts in found.items():
        assert set(parts) == set(PARTS)
        assert total(parts) == pytest.approx(5.0)
        assert {name for name, ms in parts.items() if ms} - {"other", "between"} == {kind}


def test_the_limit_is_the_ratio_of_multiply_adds(result, sd, student) -> None:
    sizes = [size_of(Teacher(folder).unet_config) for folder in (sd, student)]
    teachers, students = (size.macs + size.attention_macs for size in sizes)
    rows = [row for row in result.rows if row.model == "small"]
    assert {row.batch_size for row in rows} == {1, 2}
    assert {row.limit for row in rows} == {teachers / students}
    assert result.models["small"].parameters == sizes[1].parameters
    for row in rows:
        assert row.share == row.speed_up / row.limit
        assert row.interval[0] <= row.speed_up <= row.interval[1]


def test_a_plan_that_is_not_trained_is_as_large_as_its_student(result, sd) -> None:
    net = build(Teacher(sd), load_plan("bk-tiny"))
    assert result.models["plan bk-tiny"].parameters == sum(p.numel() for p in net.parameters())


def test_parts_add_up(result) -> None:
    baseline = {row.batch_size: row for row in result.rows if row.model == "sd"}
    for row in result.rows:
        first = baseline[row.batch_size]
        assert row.seconds == pytest.approx((row.text_ms + 7 * row.denoiser_ms + row.vae_ms) / 1000)
        assert row.pictures_per_s == pytest.approx(row.batch_size / row.seconds)
        assert total(row.kinds_ms) == pytest.approx(row.denoiser_ms)
        assert all(ms > 0 for kind, ms in row.kinds_ms.items() if kind != "between")
        assert total(row.over_ms) == pytest.approx(row.denoiser_ms - first.denoiser_ms / row.limit)
        assert row.speed_up == pytest.approx(first.denoiser_ms / row.denoiser_ms)
    assert {row.speed_up for row in baseline.values()} == {1.0}


def test_what_is_below_the_limit_is_explained_by_its_largest_part(result) -> None:
    at = next(i for i, row in enumerate(result.rows) if row.model == "small" and row.batch_size == 2)
    limit = result.rows[at].limit

    def text_of(result: Bench, **changes: Any) -> str:
        over = dict.fromkeys(PARTS, 0.0) | {"attention": 1.5, "matmul": 0.5}
        rows = list(result.rows)
        judged = {"share": 0.5, "over_ms": over, "interval": (0.4 * limit, 0.6 * limit)}
        rows[at] = replace(rows[at], **{**judged, **changes})
        return markdown(result.model_copy(update={"rows": rows}))

    text = partial(text_of, result)

    assert "small (batch 2): the interval is too wide to judge" in text(interval=(0.1, 10.0))
    judged = text()
    words = "**small (batch 2) reaches 50 % of its limit by MACs**: most of the time over the limit goes into att"
    assert words in judged
    macs = {name: model.macs["attention"] for name, model in result.models.items()}
    assert f"| {100 * macs['small'] / macs['sd']:.0f} % | +1.5 |" in judged
    assert "small (batch 2) reaches" not in text(share=0.9)
    models = result.models | {"small": result.models["small"].model_copy(update={"rows": 1})}  # without guidance
    half = text_of(result.model_copy(update={"models": models}))
    assert f"| {50 * macs['small'] / macs['sd']:.0f} % | +1.5 |" in half


def test_files_hold_the_results(result, tmp_path) -> None:
    write_speeds(result, tmp_path)
    assert read_json(tmp_path / "bench.json") == json.loads(json.dumps(result.facts()))
    assert markdown(result) in (tmp_path / "bench.md").read_text()
    svg = ElementTree.parse(tmp_path / "bench.svg").getroot()
    words = " ".join(svg.itertext())
    for row in result.rows:
        assert f"{row.speed_up:.2f}× of {row.limit:.2f}×" in words or row.model == "sd"
    width = float(svg.get("width", 0))
    bars = [(float(r.get("x", 0)), float(r.get("width", 0))) for r in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert all(x >= 0 and x + length <= width for x, length in bars)


def test_bars_of_a_call_are_as_long_as_its_kinds(result) -> None:
    """In the chart, a model's bar over the baseline's is its time over the baseline's."""
    svg = ElementTree.fromstring(chart(result))
    ns = "{http://www.w3.org/2000/svg}"
    panel = next(g for g in svg.iter(f"{ns}g") if g.get("aria-label") == "A denoiser call by operations")
    rows = [row for row in panel.iter(f"{ns}g") if row.get("class") == "row"]
    lengths = [sum(float(r.get("width", 0)) for r in row.iter(f"{ns}rect")) for row in rows]
    times = [row.denoiser_ms for row in result.rows if row.batch_size == 1]
    for (a, b), (x, y) in zip(itertools.pairwise(lengths), itertools.pairwise(times), strict=True):
        assert b / a == pytest.approx(y / x, rel=0.02)


def test_another_runtime_stands_beside_torch(result) -> None:
    """Its rows have no kinds of operations and no memory of calls, and are compared with the baseline in torch."""
    at = [i for i, row in enumerate(result.rows) if row.model == "small"]
    rows = list(result.rows)
    for i in at:
        rows[i] = replace(rows[i], mode="openvino", kinds_ms={}, over_ms={}, peak_memory_mb=None, share=0.5)
    changes = {"runtime": "openvino", "precision": "int8 in bf16", "process_mb": 321.0, "apart": 0.0123}
    models = {**result.models, "small": result.models["small"].model_copy(update=changes)}
    both = Bench.model_validate_json(result.model_copy(update={"rows": rows, "models": models}).model_dump_json())
    text = markdown(both)
    assert "OpenVINO int8 in bf16, float32, 16 px" in text
    assert re.search(r"\| small \| OpenVINO int8 in bf16 \| [\d.]+ \| 321 \| 0.0123 \|", text)
    assert "| small | openvino | 1 |" in text and "not measured" in text
    words = " ".join(ElementTree.fromstring(chart(both)).itertext())
    assert "openvino" in words and "Throughput" in words and "Peak memory" not in words


def test_pictures_to_compare_are_drawn_as_their_model_draws(monkeypatch) -> None:
    how, seen = EmbeddedGuidance(steps=2, guidance_scale=3, guidance_range=(1, 8)), []
    black = Image.new("RGB", (8, 8))
    monkeypatch.setattr("prunet.speed.bench.draw_alone", lambda *given: seen.append(given) or (black, 9.0))
    told = {name: BenchModel(parameters=1, macs={}, rows=1, steps=2, precision="", runtime=name) for name in RUNTIMES}
    found = _pictures(told, {name: Model(name) for name in told}, dict.fromkeys(told, how), 8)
    assert [(model.source, way) for model, _, way, _ in seen] == [(name, how) for name in RUNTIMES]
    assert [(model.process_mb, model.apart) for model in found.values()] == [(9, None), (9, 0)]


LOG = """\
[INFO ] stable-diffusion.cpp:3168 - get_learned_condition completed, taking 20 ms
[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 1.40s
[INFO ] stable-diffusion.cpp:3212 - decode_first_stage completed, taking 0.50s
"""


@pytest.fixture
def sd_cpp(student, tmp_path):
    """A program that prints what stable-diffusion.cpp prints, and a file for it with its configs."""
    (file := tmp_path / "student.gguf").write_bytes(bytes(2**20))
    shutil.copytree(student, file.with_suffix(".config"), ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "log").write_text(LOG)
    program = tmp_path / "sd-cli"
    program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/given\ncat {tmp_path}/log\nsleep 0.1\ntouch "$6"\n')
    program.chmod(0o755)
    return str(file), str(program)


def test_a_program_that_times_itself_stands_beside_torch(sd, sd_cpp, tmp_path) -> None:
    file, program = sd_cpp
    pipelines = open_models([str(sd), file], sd_cpp=program)
    found = bench(pipelines, steps=7, repeats=4)
    row = next(row for row in found.rows if row.mode == "sd.cpp")
    assert (row.text_ms, row.denoiser_ms, row.vae_ms, row.seconds) == pytest.approx((20, 200, 500, 1.92))
    assert row.interval[0] <= row.speed_up <= row.interval[1]
    model = found.models["student.gguf"]
    assert model.weights_mb == 1 and 0 < model.process_mb < 50  # not that of this process, which started it
    given = (tmp_path / "given").read_text().splitlines()
    assert len(given) == 3 and " -W 16 -H 16 --steps 7 --cfg-scale 7.5 -s 0 " in given[0]
    assert "| student.gguf | stable-diffusion.cpp gguf | 1.00 |" in markdown(found)


def test_what_such_a_program_cannot_do_is_refused(sd, sd_cpp, tmp_path, capsys) -> None:
    file, program = sd_cpp
    (tmp_path / "alone.gguf").touch()
    for words, message in (
        ((sd, file, "--sd-cpp", tmp_path / "no"), "--sd-cpp: no program"),
        ((sd, file), "student.gguf: a file for stable-diffusion.cpp"),
        ((sd, "--sd-cpp", program), "no model is a file"),
        ((file, sd, "--sd-cpp", program), "cannot be the baseline"),
        ((sd, tmp_path / "alone.gguf", "--sd-cpp", program), "no alone.config beside it"),
        ((sd, file, "--sd-cpp", program, "--batch-size", 4), "one picture at a time"),
    ):
        code, _, err = call(capsys, "bench", "--device", "cpu", "--precision", "no", *words)
        assert code == 2 and message in " ".join(err.split()), err
    timed = open_models([str(sd), file], sd_cpp=program)["student.gguf"]
    for log, message in ((LOG.replace("sampling", "drawing"), "seconds of sampling"), ("", "does not draw with it: ")):
        (tmp_path / "log").write_text(log)
        if not log:
            Path(program).write_text("#!/bin/sh\necho '[ERROR] a.cpp:1 - get sd version failed'\nexit 1\n")
            message += r"\[ERROR\] a.cpp:1 - get sd version failed"
        with pytest.raises(UserError, match=message):
            timed.times("", Drawing(), 16)


def test_one_model_alone_has_nothing_to_be_compared_with(sd) -> None:
    result = bench(open_models([str(sd)], size=32), size=32, repeats=3)
    assert result.size == 32
    assert result.models["sd"].macs == macs_by_kind(Teacher(sd).unet_config, (16, 16))
    assert "speed-up" not in markdown(result)
    assert "Speed-up" not in chart(result)


def test_names_are_not_read_as_markup(result) -> None:
    odd = Bench.model_validate_json(result.model_dump_json().replace("small", "<b>&"))
    assert "<b>&" in " ".join(ElementTree.fromstring(chart(odd)).itertext())


def test_the_verb_prints_what_its_files_hold(capsys, sd, student, tmp_path) -> None:
    out = tmp_path / "out"
    flags = ("--device", "cpu", "--precision", "no", "--repeats", 3, "-o", out, "--json")
    code, text, _ = call(capsys, "bench", sd, student, *flags)
    assert code == 0
    facts = json.loads(text.splitlines()[-1])
    assert facts == read_json(out / "bench.json")
    assert list(facts["models"]) == ["sd", "small"]
    assert call(capsys, "bench", sd, *flags)[0] == 0  # its own folder is written again


def test_pipelines_are_refused_before_weights_load(sd, student, monkeypatch) -> None:
    for part in ("unet", "vae", "text_part"):
        monkeypatch.setattr(Teacher, part, property(lambda self: pytest.fail("a weight was read")))
    for models, options, message in (
        ([sd, student, sd], {}, "is given twice"),
        ([sd, student], {"size": 20}, "size: 20 is not a multiple of 16"),
        ([sd], {"plans": ["bk-tny"]}, "bk-tny"),
        ([sd, student / "unet"], {}, "not a diffusers pipeline folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_models([str(model) for model in models], **options)


@pytest.mark.slow
def test_compiled_denoisers_compute_the_same_and_are_compared_with_compiled_ones(sd) -> None:
    pipelines = open_models([str(sd)], ["bk-tiny"])
    result = bench(pipelines, repeats=3, compiled=True)
    assert [(row.model, row.mode) for row in result.rows] == [
        (name, mode) for mode in ("eager", "compiled") for name in ("sd", "plan bk-tiny")
    ]
    assert all(row.compile_s > 0 for row in result.rows if row.mode == "compiled")
    assert "(compiled)" in markdown(result)
    net = pipelines["sd"].pipe.unet
    inputs = {"timestep": torch.tensor([5, 5]), "encoder_hidden_states": torch.randn(2, 77, 16)}
    with torch.no_grad():
        sample = torch.randn(2, 4, 8, 8)
        ours = torch.compile(net, dynamic=False)(sample, **inputs).sample
        assert torch.allclose(ours, net(sample, **inputs).sample, atol=1e-4)
