"""The loop: resumed equals uninterrupted, micro-batches change nothing, the average and the teacher are right."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import dies_after_checkpoint, make_pipeline
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

from prunet import Teacher, UserError, build, derive, distil, load_plan
from prunet.data.encoding import cache
from prunet.evaluation.evaluation import denoiser_errors
from prunet.plan.plan import Plan
from prunet.recipe.recipe import Data, Losses, Stage
from prunet.recipe.values import Drawing
from prunet.runtime import Runtime
from prunet.search.sensitivity import check_samples
from prunet.student.student import inherit, state_hash
from prunet.teacher.process import DDPM, min_snr_weight
from prunet.training import least_squares, loop
from prunet.training import samples as reading
from prunet.training import session as training
from prunet.training.checkpoints import Saving, _check_bits, check_stage, checkpoints
from prunet.training.fsdp import unsharded
from prunet.training.least_squares import fit
from prunet.training.log import read_log
from prunet.training.loop import learning_rate_at
from prunet.training.lora import add_lora
from prunet.training.objectives import distillation
from prunet.training.samples import LiveSamples, Samples, _permutation, batches
from prunet.training.sheets import Sheets

PROCESS = DDPM(torch.linspace(0.99, 0.01, 1000), "epsilon")
CPU = Runtime(device="cpu", precision="no", log_every=1)
STAGE = Stage(steps=6, batch_size=4, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)


@pytest.fixture(scope="module")
def made(sd, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    return cache(Teacher(sd), Data(source=str(pictures), flip=True), folder, seed=1)


def train(sd, made, folder, stage=STAGE, runtime=CPU, plan="bk-small", **options):
    teacher = Teacher(sd)
    student = build(teacher, load_plan(plan))
    pairs = derive(teacher.unet_config, load_plan(plan)).pairs()
    return distil(teacher, student, pairs, made, stage, folder, seed=5, runtime=runtime, **options), teacher


def losses(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@dataclasses.dataclass
class Trained:
    folder: Path
    student: UNet2DConditionModel


@pytest.fixture(scope="module")
def whole(sd, made, tmp_path_factory) -> Trained:
    """An uninterrupted training with every checkpoint, for comparison; tests do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return Trained(folder, train(sd, made, folder, saving=Saving(1, 9))[0])


@pytest.fixture(scope="module")
def trained_two_steps(sd, made, tmp_path_factory) -> Path:
    """A finished training of two steps; tests do not change it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    train(sd, made, folder, stage=STAGE.model_copy(update={"steps": 2}))
    return folder


@pytest.fixture
def two_steps(trained_two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(trained_two_steps, tmp_path / "run"))


def test_stopped_and_resumed_equals_uninterrupted(sd, made, whole, tmp_path) -> None:
    with dies_after_checkpoint(4):
        train(sd, made, tmp_path / "parts", saving=Saving(2))
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:  # a row past the checkpoint, and one cut by the kill
        log.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')
    parts, _ = train(sd, made, tmp_path / "parts", saving=Saving(2))
    assert state_hash(parts) == state_hash(whole.student)
    assert losses(tmp_path / "parts") == losses(whole.folder)
    last = "checkpoints/step-0000006"
    for name in ("student.safetensors", "ema.safetensors"):
        a, b = (load_file(folder / last / name) for folder in (whole.folder, tmp_path / "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def stops(number: int) -> Iterator[None]:
    """Turns a signal into KeyboardInterrupt, as a command does."""

    def stopped(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stopped)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        assert signal.getsignal(number) is stopped
    finally:
        signal.signal(number, before)


def test_a_signal_ends_the_step_with_a_checkpoint(sd, made, whole, tmp_path) -> None:
    """The signal arrives while the sheet of step 3 is drawn. The next test sends another of the signals."""

    class Interrupts:
        every = 3

        def draw(self, step: int, student: UNet2DConditionModel) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with stops(signal.SIGINT):
        train(sd, made, tmp_path, sheets=Interrupts(), saving=Saving(100))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000003"]
    again, _ = train(sd, made, tmp_path)
    assert state_hash(again) == state_hash(whole.student)
    assert losses(tmp_path) == losses(whole.folder)


def test_a_stop_between_two_rows_of_the_log_leaves_no_trace_in_it(sd, made, whole, tmp_path, monkeypatch) -> None:
    """The sums and the time from before the stop count in the row after it."""
    runtime, step, now, taken = dataclasses.replace(CPU, log_every=4), training.Session.step, [0.0], Counter[str]()
    part = "whole"

    def step_and_stop(session: training.Session, learning_rate: float) -> torch.Tensor:
        now[0] += 2 ** taken[part]  # the seconds of each step are others
        taken[part] += 1
        if part == "parts" and taken[part] in (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(session, learning_rate)

    monkeypatch.setattr(training.Session, "step", step_and_stop)
    monkeypatch.setattr("prunet.training.sums.time", SimpleNamespace(perf_counter=lambda: now[0]))
    train(sd, made, tmp_path / "whole", runtime=runtime)
    part = "parts"
    for last in (1, 5):
        with stops(signal.SIGTERM):
            train(sd, made, tmp_path / "parts", runtime=runtime)
        assert checkpoints(tmp_path / "parts")[-1].name == f"step-{last:07d}"
        now[0] += 1000  # until it goes on: in no row
    parts, _ = train(sd, made, tmp_path / "parts", runtime=runtime)
    assert state_hash(parts) == state_hash(whole.student)
    rows = read_log(tmp_path / "parts" / "log.jsonl")
    assert rows == read_log(tmp_path / "whole" / "log.jsonl")
    assert [(row["step"], row["images_per_s"]) for row in rows] == [
        (4, pytest.approx(4 * STAGE.batch_size / 15, abs=1e-4)),
        (6, pytest.approx(2 * STAGE.batch_size / 48, abs=1e-4)),
    ]


def plain_losses(sd: Path, made, stage: Stage, dtype: torch.dtype) -> list[float]:
    """The loop written plainly: stock attention, optimizer and losses of PyTorch, features copied to fp32."""
    teacher, student = Teacher(sd, dtype=dtype), build(Teacher(sd), load_plan("bk-small")).train().requires_grad_(True)
    kept, pairs = {}, derive(teacher.unet_config, load_plan("bk-small")).pairs(stage.losses.level)

    def keep(name: str):
        return lambda module, inputs, out: kept.update({name: (out[0] if isinstance(out, tuple) else out).float()})

    for pair in pairs:
        teacher.unet.get_submodule(pair.teacher).register_forward_hook(keep(f"teacher {pair.teacher}"))
        student.get_submodule(pair.student).register_forward_hook(keep(f"student {pair.teacher}"))
    decay = stage.weight_decay
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=decay, foreach=False, fused=False)
    samples, found, mse = Samples(made, stage, 5, PROCESS), [], torch.nn.functional.mse_loss
    for step in range(stage.steps):
        items = [samples[step, place] for place in range(stage.batch_size)]
        latents, noise, t = (torch.stack([i[k] for i in items]) for k in ("latents", "noise", "timestep"))
        text = torch.stack([i["condition"]["prompt_embeds"] for i in items])
        noisy = teacher.noise_scheduler.add_noise(latents, noise, t)
        with torch.no_grad():
            theirs = teacher.unet(noisy.to(dtype), t, text.to(dtype)).sample
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ours = student(noisy, t, text).sample
        loss = mse(ours.float(), noise) + mse(ours.float(), theirs.float())
        loss = loss + sum(mse(kept[f"student {p.teacher}"], kept[f"teacher {p.teacher}"]) for p in pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), stage.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(stage, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("precision", "dtype", "rel"), [("no", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.01)])
def test_fast_kernels_change_no_loss(sd, made, tmp_path, precision, dtype, rel) -> None:
    stage = STAGE.model_copy(update={"losses": Losses(level="layer")})
    teacher = Teacher(sd, dtype=dtype)
    pairs = derive(teacher.unet_config, load_plan("bk-small")).pairs("layer")
    student, runtime = build(Teacher(sd), load_plan("bk-small")), dataclasses.replace(CPU, precision=precision)
    distil(teacher, student, pairs, made, stage, tmp_path, seed=5, runtime=runtime)
    plain = plain_losses(sd, made, stage, dtype)
    assert [row["loss"] for row in losses(tmp_path)] == pytest.approx(plain, rel=rel)
    assert plain[-1] < 0.9 * plain[0], "too little is learned for a fault in the optimizer to show"


def test_micro_batches_change_nothing_but_rounding(sd, made, whole, tmp_path) -> None:
    train(sd, made, tmp_path / "four", runtime=Runtime(device="cpu", precision="no", micro_batch=1, log_every=1))
    for a, b in zip(losses(whole.folder), losses(tmp_path / "four"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_rounding(sd, made, whole, tmp_path) -> None:
    stage = STAGE.model_copy(update={"steps": 3})
    train(sd, made, tmp_path / "tiny", plan="bk-tiny", stage=stage)
    for plan, plain in (("bk-small", whole.folder), ("bk-tiny", tmp_path / "tiny")):
        small = Runtime(device="cpu", precision="no", gradient_checkpointing=True, log_every=1)
        train(sd, made, tmp_path / plan, runtime=small, plan=plan, stage=stage)
        for a, b in zip(losses(plain)[:3], losses(tmp_path / plan), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_teacher_is_not_changed_and_student_learns(sd, made, tmp_path) -> None:
    untouched = state_hash(Teacher(sd).unet)
    stage = STAGE.model_copy(update={"steps": 24, "learning_rate": 3e-3, "caption_dropout": 0.0})
    student, teacher = train(sd, made, tmp_path / "run", stage=stage)
    assert state_hash(teacher.unet) == untouched
    rows = losses(tmp_path / "run")
    assert sum(r["feature"] for r in rows[-5:]) < 0.7 * sum(r["feature"] for r in rows[:5])
    saved = load_file(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "student.safetensors")
    assert saved.keys() == student.state_dict().keys(), "the checkpoint holds something else than the student"


def test_ema_is_the_average_of_the_student_by_hand(whole) -> None:
    """Recomputed from the student of every checkpoint, with diffusers' warm-up (1 + n) / (10 + n)."""
    student = whole.student
    saved = [load_file(folder / "student.safetensors") for folder in checkpoints(whole.folder)]
    average = saved[0]
    for n, weights in enumerate(saved[1:], 1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {k: decay * v + (1 - decay) * weights[k] for k, v in average.items()}
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(student.conv_in.weight, saved[-1]["conv_in.weight"])


#: Enough to come nearer to the teacher, whose random weights say nothing of the noise that was drawn (`task`).
LEARNING = Stage(
    steps=12,
    batch_size=4,
    learning_rate=3e-4,
    warmup_steps=0,
    ema_decay=None,
    caption_dropout=0.0,
    losses=Losses(task=1e-6),
)


def distance(folder: Path, student: UNet2DConditionModel) -> float:
    """The student's distance from the teacher on fixed noisy latents."""
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    error, power = denoiser_errors(Teacher(folder), student, ["a", "b", "c", "d"], latents, seed=0)
    return (error.sum() / power.sum()).item()


@pytest.mark.parametrize(("kind", "plan"), [("sd", "bk-tiny"), ("sdxl", "vega")])
def test_bf16_trains_and_draws(kind, plan, request, pictures, tmp_path) -> None:
    teacher = Teacher(request.getfixturevalue(kind), dtype=torch.bfloat16)
    made = cache(teacher, Data(source=str(pictures), limit=4), tmp_path / "cache")
    student = build(Teacher(request.getfixturevalue(kind)), load_plan(plan))
    before = distance(request.getfixturevalue(kind), student)
    pairs = derive(teacher.unet_config, load_plan(plan)).pairs()
    how = {"seed": 1, "size": 16, "drawing": Drawing(steps=1), "idle": ["vae", "text"]}
    sheets = Sheets(teacher, tmp_path / "sheets", ["a"], LEARNING.steps, **how)
    runtime = Runtime(device="cpu", precision="bf16", log_every=1)
    distil(teacher, student, pairs, made, LEARNING, tmp_path / "run", runtime=runtime, sheets=sheets)
    assert distance(request.getfixturevalue(kind), student) < 0.7 * before
    assert student.dtype == torch.float32
    assert len(list((tmp_path / "sheets").iterdir())) == 2
    assert not {"vae", "_text_parts"} & vars(teacher).keys()  # the training does not keep them in memory
    assert "forward" not in vars(student)


def test_gradient_that_is_not_finite_stops_before_the_checkpoint(sd, made, tmp_path, monkeypatch) -> None:
    """A finite loss with an infinite gradient would put NaN into weights that a checkpoint calls good."""
    real = distillation.mse

    def steep(prediction, target, weight=None):
        loss = real(prediction, target, weight)
        if prediction.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(distillation, "mse", steep)
    with pytest.raises(UserError, match="grad_norm"):
        train(sd, made, tmp_path / "run", saving=Saving(1))
    assert checkpoints(tmp_path / "run") == []


def test_pace_of_a_finished_stage_may_not_change_but_for_more_steps(sd, made, two_steps) -> None:
    with pytest.raises(UserError, match="is finished, with learning_rate"):
        train(sd, made, two_steps, stage=STAGE.model_copy(update={"steps": 2, "learning_rate": 0.5}))


def test_terms_of_the_empty_plan_vanish(sd, made, tmp_path) -> None:
    """A student that is the teacher has no output or feature loss at the first step."""
    teacher = Teacher(sd)
    plan = load_plan([])
    student, pairs = build(teacher, plan), derive(teacher.unet_config, plan).pairs()
    distil(teacher, student, pairs, made, STAGE.model_copy(update={"steps": 1}), tmp_path / "run", seed=5, runtime=CPU)
    first = losses(tmp_path / "run")[0]
    assert first["output"] == pytest.approx(0, abs=1e-10)
    assert first["feature"] == pytest.approx(0, abs=1e-8)
    assert first["task"] > 0.1


def test_min_snr_weighs_the_task_and_never_the_kd_terms(sd, made, whole, tmp_path) -> None:
    train(sd, made, tmp_path, stage=STAGE.model_copy(update={"steps": 1, "min_snr_gamma": 1.0}))
    a, b = losses(whole.folder)[0], losses(tmp_path)[0]
    assert b["task"] < a["task"]
    assert (b["output"], b["feature"]) == (a["output"], a["feature"])
    assert min_snr_weight(torch.tensor([0.99]), 1.0, "epsilon").item() < 1


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(sd, made, tmp_path, monkeypatch) -> None:
    real = distillation.mse
    calls = iter(range(10**6))

    def breaks(*args):
        return real(*args) * (float("nan") if next(calls) >= 2 * 4 else 1.0)

    monkeypatch.setattr(distillation, "mse", breaks)
    with pytest.raises(UserError, match=r"not finite at step 5.*lower learning_rate"):
        train(sd, made, tmp_path / "run", saving=Saving(2))
    kept = checkpoints(tmp_path / "run")
    assert [p.name for p in kept] == ["step-0000002", "step-0000004"]
    assert all(torch.isfinite(t).all() for t in load_file(kept[-1] / "student.safetensors").values())


def test_checkpoint_of_other_settings_is_refused_but_the_pace_may_change(sd, made, two_steps, monkeypatch) -> None:
    other = STAGE.model_copy(update={"losses": Losses(feature=0.0)})
    with pytest.raises(UserError, match="losses"):
        train(sd, made, two_steps, stage=other)
    label = json.loads((two_steps / "checkpoints" / "step-0000002" / "state.json").read_text())
    label["stage"]["random_captions"] = True  # a key that is left out if it has its default
    with monkeypatch.context() as patch, pytest.raises(UserError, match="random_captions True, now its default: set"):
        patch.setattr("prunet.training.checkpoints.read_label", lambda *_: label)
        check_stage(two_steps, STAGE)
    train(sd, made, two_steps, stage=STAGE.model_copy(update={"steps": 4, "learning_rate": 5e-4}))
    assert losses(two_steps)[-1]["step"] == 4


def test_damaged_checkpoint_is_one_clear_line(sd, made, two_steps) -> None:
    file = two_steps / "checkpoints" / "step-0000002" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        train(sd, made, two_steps)


def test_too_little_memory_is_not_called_damage(sd, made, two_steps, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("prunet.training.checkpoints.load_file", full)
    with pytest.raises(torch.OutOfMemoryError):  # and no advice to delete the checkpoint
        train(sd, made, two_steps)


def test_only_the_last_checkpoints_are_kept(sd, made, tmp_path) -> None:
    train(sd, made, tmp_path / "run", STAGE.model_copy(update={"steps": 3}), saving=Saving(1, 2))
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-0000002", "step-0000003"]
    (tmp_path / "run" / "checkpoints" / "step-10000000").mkdir()  # its number has a digit more
    (tmp_path / "run" / "checkpoints" / "step-9999000").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-9999000 copy").mkdir()  # not prunet's
    assert [p.name for p in checkpoints(tmp_path / "run")][-2:] == ["step-9999000", "step-10000000"]


def test_cache_of_another_teacher_is_refused(made, tmp_path) -> None:
    other = make_pipeline(tmp_path / "other", "sd", seed=9)
    with pytest.raises(UserError, match="made with another text_encoder and vae"):
        train(other, made, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "prediction", "plan", "steps"),
    [("sd_v", "v_prediction", "bk-tiny", LEARNING.steps), ("sdxl", "epsilon", "vega", 1)],
)
def test_v_prediction_and_sdxl_train(kind, prediction, plan, steps, request, pictures, tmp_path) -> None:
    """The first loss is the plain formula's, and v-prediction learns; that SDXL learns is above, in bf16."""
    folder = request.getfixturevalue(kind)
    teacher = Teacher(folder)
    made = cache(teacher, Data(source=str(pictures), limit=4), tmp_path / "cache")
    student, _ = train(folder, made, tmp_path / "run", plan=plan, stage=LEARNING.model_copy(update={"steps": steps}))
    before = build(teacher, load_plan(plan))
    assert steps == 1 or distance(folder, student) < 0.7 * distance(folder, before)
    samples = Samples(made, LEARNING, 5, teacher.process)
    batch = default_collate([samples[0, place] for place in range(4)])
    latents, noise, t, known = (batch[key] for key in ("latents", "noise", "timestep", "condition"))
    scheduler = teacher.noise_scheduler
    signal, sigma = (
        x.view(-1, 1, 1, 1) for x in (scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5)
    )
    added = {"text_embeds": known["pooled"], "time_ids": known["time_ids"]} if kind == "sdxl" else None
    with torch.no_grad():
        said = before(signal * latents + sigma * noise, t, known["prompt_embeds"], added_cond_kwargs=added).sample
    target = noise if prediction == "epsilon" else signal * noise - sigma * latents  # of arXiv 2202.00512
    first = losses(tmp_path / "run")[0]
    assert first["task"] == pytest.approx((said - target).square().mean().item(), rel=1e-4)


def test_a_signal_to_the_processes_that_read_does_not_stop_training(made, monkeypatch) -> None:
    """As on a GPU, when the whole group of processes gets it."""
    samples = Samples(made, STAGE, 3, PROCESS)
    alone = list(batches(samples, 0, 2))
    monkeypatch.setattr(reading, "workers_for", lambda *given: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    read = batches(samples, 0, 2)
    found = [next(read)]
    (reader,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(reader.pid, number)
    found += read
    assert len(found) == len(alone) > 8  # more than were prepared before the signals
    assert all(torch.equal(one["noise"], other["noise"]) for one, other in zip(found, alone, strict=True))


def test_processes_read_only_if_shared_memory_is_large_enough(made, tmp_path, monkeypatch, capsys) -> None:
    samples = Samples(made, STAGE, 3, PROCESS)
    item = samples[0, 0]
    size = sum(v.nbytes for v in [item["latents"], item["noise"], item["timestep"], *item["condition"].values()])
    monkeypatch.setattr(reading, "SHARED_MEMORY", tmp_path)
    for free, workers in ((8 * 4 * size, reading.WORKERS), (8 * 4 * size - 1, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert reading.workers_for(samples, 0, 4) == workers
    assert capsys.readouterr().err.count("--shm-size") == 1
    monkeypatch.setattr(reading, "SHARED_MEMORY", tmp_path / "none")
    assert reading.workers_for(samples, 0, 4) == reading.WORKERS


def test_moments_of_another_optimizer_are_refused(tmp_path) -> None:
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    in_8_bits = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim.adamw"})()
    kept = {name: {"state": {0: {name: torch.zeros(2)}}} for name in ("exp_avg", "state1")}
    for moments, optimizer in ((kept["exp_avg"], plain), (kept["state1"], in_8_bits), ({"state": {}}, in_8_bits)):
        _check_bits(moments, optimizer, tmp_path / "step-2")
    with pytest.raises(UserError, match="step-2: its optimizer was in 8 bits: resume with --use-8bit-adam, or delete"):
        _check_bits(kept["state1"], plain, tmp_path / "step-2")
    with pytest.raises(UserError, match="was not in 8 bits: resume without --use-8bit-adam"):
        _check_bits(kept["exp_avg"], SimpleNamespace(optimizer=in_8_bits), tmp_path / "step-2")


def test_a_tracker_ends_without_the_group_of_processes(sd, made, tmp_path, monkeypatch) -> None:
    """`end_training` would end the group too, and the run that saves the student after that needs it."""
    ended = []
    save = training.Session.save

    def saved(self, *given) -> None:
        self.accelerator.trackers = [SimpleNamespace(finish=lambda: ended.append("tracker"))]
        save(self, *given)

    monkeypatch.setattr(training.Session, "save", saved)
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda self: ended.append("all"))
    train(sd, made, tmp_path / "run")
    assert ended == ["tracker"]


def test_draws_depend_on_step_and_position_alone(made) -> None:
    samples = Samples(made, STAGE, 3, PROCESS)
    whole = list(batches(samples, 0, 4, 0, 1))
    later = list(batches(samples, 4, 4, 0, 1))
    assert torch.equal(whole[4]["noise"], later[0]["noise"])
    shares = [list(batches(samples, 0, 2, rank, 2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([shares[0][1]["latents"], shares[1][1]["latents"]]), whole[1]["latents"])
    assert not torch.equal(whole[0]["noise"][0], whole[0]["noise"][1])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_text_embedded_while_training_is_that_of_a_cache(kind, pictures, request, tmp_path) -> None:
    teacher = Teacher(request.getfixturevalue(kind))
    stage = STAGE.model_copy(update={"caption_dropout": 0.3})
    data = [Data(source=str(pictures), text=text) for text in ("cached", "live")]
    made = [cache(teacher, one, tmp_path / one.text, seed=1) for one in data]
    stored = [set(load_file(opened.folder / "shard-00000.safetensors")) for opened in made]
    assert stored[0] - stored[1] == {"prompt_embeds", "pooled"} - ({"pooled"} if kind == "sd" else set())
    known = list(batches(Samples(made[0], stage, 3, teacher.process), 0, 2))
    live = LiveSamples(made[1], stage, 3, teacher)
    assert reading.workers_for(live, 0, 2) in (0, reading.WORKERS)  # its items have a caption, too
    for before, now in zip(known, batches(live, 0, 2), strict=True):
        assert now.keys() == before.keys() and now["condition"].keys() == before["condition"].keys()
        for name, value in before["condition"].items():
            torch.testing.assert_close(now["condition"][name], value, rtol=2e-3, atol=2e-3)
        assert torch.equal(now["noise"], before["noise"]) and torch.equal(now["latents"], before["latents"])
    with pytest.raises(UserError, match=r"data\.text is live"):
        check_samples(teacher, None, made[1].folder)


def test_live_text_learns_the_same_and_resumes(sd, pictures, whole, tmp_path) -> None:
    made = cache(Teacher(sd), Data(source=str(pictures), flip=True, text="live"), tmp_path / "cache", seed=1)
    student, _ = train(sd, made, tmp_path / "run")
    for row, known in zip(losses(tmp_path / "run"), losses(whole.folder), strict=True):
        assert row == pytest.approx(known, rel=1e-3)
    train(sd, made, tmp_path / "again", stage=STAGE.model_copy(update={"steps": 3}))
    resumed, _ = train(sd, made, tmp_path / "again")
    assert state_hash(resumed) == state_hash(student)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_no_draw_of_one_seed_is_one_of_another(made) -> None:
    """A generator numbered from the seed would repeat the next seed's after a million samples."""
    first, second = (Samples(made, STAGE.model_copy(update={"batch_size": 1}), seed, PROCESS) for seed in (1, 2))
    start = second[0, 0]["noise"]
    assert not any(torch.equal(first[step, 0]["noise"], start) for step in (0, 1, 1_000_003, 2**32))


def test_captions_are_dropped_at_the_rate_asked_for(made) -> None:
    stage = STAGE.model_copy(update={"caption_dropout": 0.25, "steps": 100})
    samples = Samples(made, stage, 3, PROCESS)
    empty = samples.unconditional["prompt_embeds"][0]
    drawn = [samples[step, i]["condition"]["prompt_embeds"] for step in range(100) for i in range(4)]
    dropped = sum(torch.equal(embeds, empty) for embeds in drawn)
    assert 70 < dropped < 130


def test_fitted_layers_bring_the_output_nearer_on_other_samples(sd, made) -> None:
    teacher = Teacher(sd)
    batch = next(batches(Samples(made, STAGE, 99, teacher.process), 0, 4))
    noisy = teacher.process.add_noise(batch["latents"], batch["noise"], batch["timestep"])

    def output(net):
        with torch.no_grad():
            return teacher.architecture.call(net, noisy, batch["timestep"], batch["condition"])

    def error(net):
        return float((output(net) - output(teacher.unet)).square().mean())

    derived = derive(teacher.unet_config, load_plan("bk-small"))
    student = inherit(teacher.unet, derived)
    before = error(student)
    fit(teacher, student, derived, made, seed=5)
    assert "unet" not in vars(teacher)  # the device holds one denoiser at a time
    assert error(student) < 0.5 * before, (error(student), before)
    whole = derive(teacher.unet_config, Plan("none"))
    for dtype in (torch.float32, torch.bfloat16):  # the rounding of a teacher is not fitted to
        teacher = Teacher(sd, dtype=dtype)
        same = fit(teacher, inherit(teacher.unet, whole), whole, made, seed=5)
        assert state_hash(same) == state_hash(inherit(teacher.unet, whole))


def test_layers_are_fitted_alike_in_pieces(sd, made, monkeypatch) -> None:
    teacher = Teacher(sd)
    derived = derive(teacher.unet_config, load_plan("bk-small"))
    fitted = [fit(teacher, inherit(teacher.unet, derived), derived, made, seed=5)]
    monkeypatch.setattr(least_squares, "CHUNK", 1)  # one sample at a time
    fitted.append(fit(teacher, inherit(teacher.unet, derived), derived, made, seed=5))
    whole, pieces = (net.state_dict() for net in fitted)
    assert any(
        not torch.equal(whole[name], value) for name, value in inherit(teacher.unet, derived).state_dict().items()
    )
    for name, value in whole.items():
        assert torch.allclose(value, pieces[name], rtol=1e-4, atol=1e-5), name


def test_where_there_is_much_noise_other_captions_are_shown(made) -> None:
    stage = STAGE.model_copy(update={"caption_dropout": 0.0, "random_captions": True})
    without = stage.model_copy(update={"random_captions": False})
    own, random = (Samples(made, one, 3, PROCESS) for one in (without, stage))
    other: dict[bool, list[bool]] = {True: [], False: []}
    for at in [(step, i) for step in range(100) for i in range(4)]:
        before, now = own[at], random[at]
        assert all(torch.equal(now[name], before[name]) for name in ("latents", "noise", "timestep"))
        swapped = not torch.equal(now["condition"]["prompt_embeds"], before["condition"]["prompt_embeds"])
        other[bool(now["timestep"] > 0.8 * PROCESS.num_timesteps)].append(swapped)
    shares = {many: sum(swapped) / len(swapped) for many, swapped in other.items()}
    # The mean of exp(-5 (1 - t / T)) is 0.63 above 0.8 and 0.09 below; among few pictures some captions are the same.
    assert 0.3 < shares[True] < 0.75 and shares[False] < 0.15


def test_an_epoch_shows_each_sample_once(made) -> None:
    seen = [_permutation(1, epoch, len(made)).tolist() for epoch in (0, 1)]
    assert sorted(seen[0]) == list(range(len(made))) == sorted(seen[1])
    assert seen[0] != seen[1]


def test_learning_rate_by_hand() -> None:
    stage = Stage(steps=12, learning_rate=1.0, warmup_steps=2, schedule="cosine")
    assert [learning_rate_at(stage, s) for s in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert learning_rate_at(Stage(steps=10, learning_rate=0.1, warmup_steps=0), 9) == 0.1


def test_a_student_in_one_piece_again_has_its_lora(sd) -> None:
    student = add_lora(build(Teacher(sd), load_plan("bk-small")), 2, seed=0)
    assert state_hash(unsharded(student)) == state_hash(student)


def test_micro_batch_that_does_not_divide_is_refused(sd, made, tmp_path) -> None:
    with pytest.raises(UserError, match=r"micro-batches of 3.*1, 2, 4"):
        train(sd, made, tmp_path / "run", runtime=Runtime(device="cpu", precision="no", micro_batch=3))


def test_all_processes_take_the_micro_batch_of_the_smallest_device(sd, made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop.processes, "gather", lambda mine: [*mine, (1, 2)])
    monkeypatch.setattr(loop, "train", lambda objective, student, samples, micro_batch, *_, **__: micro_batch)
    assert train(sd, made, tmp_path)[0] == 2  # four fit on this device


def test_average_that_waits_on_the_cpu_is_the_same(sd, made, whole, tmp_path) -> None:
    offloaded, _ = train(sd, made, tmp_path / "offloaded", runtime=dataclasses.replace(CPU, offload_ema=True))
    assert state_hash(offloaded) == state_hash(whole.student)


def test_teacher_in_8_bits_teaches_nearly_the_same(sd, made, two_steps, tmp_path) -> None:
    """Where torchao is installed: other bits, losses within two percent."""
    pytest.importorskip("torchao")
    stage = STAGE.model_copy(update={"steps": 2})
    train(sd, made, tmp_path / "small", stage=stage, runtime=dataclasses.replace(CPU, teacher_8bit=True))
    for ours, theirs in zip(losses(tmp_path / "small"), losses(two_steps), strict=True):
        assert ours["output"] != theirs["output"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


def test_batches_of_buckets_have_one_size_and_see_every_picture(sdxl, tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(14):
        Image.new("RGB", [(40, 40), (80, 40), (40, 80)][min(i // 6, 2)], (10 * i, 90, 200)).save(
            folder / f"{i:02d}.png"
        )
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    teacher = Teacher(sdxl)
    made = cache(teacher, Data(source=str(folder), size=32, buckets=True), tmp_path / "c")
    stage = Stage(steps=7, batch_size=2, warmup_steps=0, caption_dropout=0.0)
    samples = Samples(made, stage, 1, PROCESS)
    seen = [[samples._choose(step, position) for position in range(2)] for step in range(7)]
    assert sorted(itertools.chain(*seen)) == list(range(14))  # 3, 3 and 1 batches are one epoch
    assert all(len({samples[(step, p)]["latents"].shape for p in range(2)}) == 1 for step in range(7))
    plan = load_plan("vega")
    pairs = derive(teacher.unet_config, plan).pairs("layer")
    distil(teacher, build(teacher, plan), pairs, made, stage, tmp_path / "run", seed=1, runtime=CPU)
    assert len(losses(tmp_path / "run")) == 7


def test_pictures_of_a_rare_size_are_seen_as_often_as_others() -> None:
    groups = range(90), range(90, 93), range(93, 100)
    stage = STAGE.model_copy(update={"batch_size": 32})
    samples = Samples(SimpleNamespace(groups=groups, unconditional=None), stage, 1, PROCESS)  # type: ignore[arg-type]
    epoch = 31 + 1 + 2  # batches in eleven passes, so that three pictures fill one
    seen = Counter(samples._choose(step, position) for step in range(epoch) for position in range(32))
    times = [sum(seen[i] for i in group) / len(group) for group in groups]
    assert times == pytest.approx([11, 11, 11], rel=0.2), times


@pytest.mark.processes  # with what calls a compiler
@pytest.mark.parametrize("what", [{"compile": True}, {"compile_blocks": True}])
def test_compiled_equals_plain(sd, made, tmp_path, monkeypatch, what) -> None:
    """Dynamo's graphs run unchanged: no feature is lost, and there is no graph break.

    In bf16, so that the CPU's attention by chunks is among them.
    """
    backend_of, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **given: backend_of(f, **given, backend=backend, fullgraph=True))
    stage = STAGE.model_copy(update={"steps": 2, "losses": Losses(level="layer")})
    runtime = dataclasses.replace(CPU, precision="bf16")
    train(sd, made, tmp_path / "plain", stage=stage, runtime=runtime)
    torch._dynamo.reset()
    student, teacher = train(sd, made, tmp_path / "compiled", stage=stage, runtime=dataclasses.replace(runtime, **what))
    assert type(student) is UNet2DConditionModel
    assert all(module._compiled_call_impl is None for net in (student, teacher.unet) for module in net.modules())
    assert graphs
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    for a, b in zip(plain, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_channels_last_changes_nothing_but_rounding(sd, made, whole, tmp_path) -> None:
    """Weights have another memory layout while they train; files do not show it, and a stopped run resumes."""
    fast = dataclasses.replace(CPU, channels_last=True)
    train(sd, made, tmp_path / "fast", stage=STAGE.model_copy(update={"steps": 3}), saving=Saving(3))
    student, teacher = train(sd, made, tmp_path / "fast", runtime=fast, saving=Saving(3))
    for net in (student, teacher.unet):
        assert all(p.is_contiguous() for p in net.parameters())
    for a, b in zip(losses(whole.folder), losses(tmp_path / "fast"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    again, _ = train(sd, made, tmp_path / "fast", stage=STAGE.model_copy(update={"steps": 7}))
    assert again.conv_in.weight.is_contiguous()
