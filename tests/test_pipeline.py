"""Drawing, and export: stock, bit-equal, checked before it is called done."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file

from prunet import Drawing, Teacher, UserError, build, export, generate, load_plan
from prunet.denoisers.freeze import freeze
from prunet.exports.folder import check_export
from prunet.exports.single_file import export_single_file
from prunet.sampling.draw import decode, draw, draw_latents
from prunet.sampling.made_for import drawing_of
from prunet.sampling.samplers import SAMPLERS, sampler_of, set_sampler
from prunet.student.student import state_hash
from prunet.teacher.tokens import unusual_tokens

KINDS = [("sd", "bk-tiny"), ("sdxl", "ssd-1b")]
KINDS += [pytest.param(*more, marks=pytest.mark.slow) for more in (("sd", "bk-small"), ("sdxl_deep", "koala-700m"))]


@dataclass
class Exported:
    teacher: Teacher
    student: Any
    folder: Path


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory) -> Callable[[str, str], Exported]:
    """A student and its pipeline, made once for each teacher and plan; tests do not change it."""

    @cache
    def make(kind: str, plan: str) -> Exported:
        teacher = Teacher(request.getfixturevalue(kind))
        student = build(teacher, load_plan(plan))
        folder = tmp_path_factory.mktemp("exported") / "out"
        export(teacher, student, folder, fp16=True)
        return Exported(teacher, student, folder)

    return make


@pytest.fixture(scope="module")
def opened(sd) -> Teacher:
    """The student of `sd` and its pipeline; tests do not change it."""
    return Teacher(sd)


@pytest.mark.parametrize(("kind", "plan"), KINDS)
def test_export_loads_in_stock_diffusers_and_draws_the_same(kind, plan, exported) -> None:
    made = exported(kind, plan)
    stock = DiffusionPipeline.from_pretrained(made.folder)
    stock.set_progress_bar_config(disable=True)
    ours = made.teacher.pipeline(unet=made.student)

    def one(pipe):
        rng = torch.Generator().manual_seed(1)
        return pipe("a cat", num_inference_steps=2, generator=rng, output_type="pt", height=16, width=16).images

    for name in (
        "unet",
        "vae",
        *made.teacher.text_encoders,
    ):  # other settings would round differently with equal weights
        freeze(getattr(stock, name))
    assert torch.equal(one(stock), one(ours))


def test_other_parts_are_the_teachers_bytes(sd, exported) -> None:
    out = exported("sd", "bk-tiny").folder
    for part in ("vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (out / part).read_bytes() == (sd / part).read_bytes()
    config = json.loads((out / "unet" / "config.json").read_text())
    assert config["mid_block_type"] is None
    assert "_name_or_path" not in config


def test_fp16_variant_is_beside_the_full_weights(exported) -> None:
    out = exported("sd", "bk-tiny").folder
    pipe = DiffusionPipeline.from_pretrained(out, variant="fp16", torch_dtype=torch.float16)
    assert pipe.unet.dtype == torch.float16
    full = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, full[k].half()) for k, v in pipe.unet.state_dict().items())


def test_check_refuses_a_changed_weight(exported) -> None:
    made = exported("sd", "bk-tiny")
    changed = copy.deepcopy(made.student)
    check_export(made.folder, changed)
    changed.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="same weights"):
        check_export(made.folder, changed)


def test_failed_export_leaves_nothing(opened, tmp_path, monkeypatch) -> None:
    from prunet.exports import folder as pipeline

    def refuse(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(pipeline, "check_export", refuse)
    with pytest.raises(RuntimeError):
        export(opened, build(opened, load_plan("bk-base")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "plan"), KINDS)
def test_single_file_opens_again(kind, plan, exported, tmp_path) -> None:
    made = exported(kind, plan)
    export_single_file(made.folder, tmp_path / "one.safetensors")
    again = Teacher(tmp_path / "one.safetensors")
    known = {part: again.fingerprint([part]) for part in ("vae", "text_encoder")}
    assert again.unet_config == Teacher(made.folder).unet_config
    for a, b in ((again.unet, made.student), (again.vae, made.teacher.vae)):
        assert state_hash(a) == state_hash(b)
    pictures = [
        generate(m, "a cat", drawing=Drawing(steps=1))[0].tobytes() for m in (made.folder, tmp_path / "one.safetensors")
    ]
    assert pictures[0] == pictures[1]
    config = tmp_path / "one.config" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    changed = Teacher(tmp_path / "one.safetensors")
    assert changed.fingerprint(["vae"]) != known["vae"]  # other latents of the same weights
    assert changed.fingerprint(["text_encoder"]) == known["text_encoder"]


def test_a_picture_does_not_depend_on_its_batch(opened) -> None:
    pipe, how = opened.pipeline(), Drawing(steps=2, sampler="ddim")
    prompts, seeds = ["a", "b", "c"], [5, 6, 7]
    together = draw(pipe, prompts, seeds, how, batch_size=3)
    alone = draw(pipe, prompts, seeds, how, batch_size=1)
    for a, b in zip(together, alone, strict=True):
        difference = max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))
        assert difference <= 1


#: The classes by whose names diffusers' users know the samplers, and what Stable Diffusion ships them with.
STOCK = {
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim-trailing": (
        DDIMScheduler,
        {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True},
    ),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {"set_alpha_to_one": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}


def test_every_sampler_draws_what_its_scheduler_draws_in_stock_diffusers(sd, opened) -> None:
    """No two samplers draw the same."""
    pipe, stock = opened.pipeline(), DiffusionPipeline.from_pretrained(sd)
    stock.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        freeze(getattr(stock, name))
    assert STOCK.keys() == SAMPLERS.keys()
    drawn: dict[str, torch.Tensor] = {}
    for name, (scheduler, options) in STOCK.items():
        drawn[name] = draw_latents(pipe, ["a cat"], [4], Drawing(steps=4, guidance_scale=2.0, sampler=name))
        stock.scheduler = scheduler.from_pretrained(sd / "scheduler", **options)
        rng = torch.Generator().manual_seed(4)
        theirs = stock("a cat", num_inference_steps=4, guidance_scale=2.0, generator=rng, output_type="latent").images
        torch.testing.assert_close(drawn[name], theirs, rtol=1e-4, atol=1e-4, msg=name)
    for one, other in itertools.combinations(drawn, 2):
        apart = (drawn[one] - drawn[other]).norm() / drawn[one].norm()
        assert apart > 1e-3, (one, other)


def test_same_seed_same_picture(sd) -> None:
    a, b = (generate(sd, "a cat", num_images=2, drawing=Drawing(steps=1), seed=4) for _ in range(2))
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b]
    assert a[0].tobytes() != a[1].tobytes()


def test_pictures_are_written_as_they_are_drawn(sd, tmp_path, monkeypatch) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    whole = generate(sd, "a cat", num_images=6, drawing=Drawing(steps=1))
    drawn = []

    def second_batch_fails(*args):
        drawn.append(args)
        if len(drawn) > 1:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr("prunet.sampling.draw.decode", second_batch_fails)
    with pytest.raises(KeyboardInterrupt):
        generate(sd, "a cat", num_images=6, drawing=Drawing(steps=1), save_to=paths)
    assert sorted(tmp_path.iterdir()) == paths[:4]
    assert [Image.open(path).tobytes() for path in paths[:4]] == [x.tobytes() for x in whole[:4]]


def test_unknown_sampler_and_size_are_refused(sd) -> None:
    with pytest.raises(UserError, match="dpmsolver"):
        generate(sd, "a", drawing=Drawing(sampler="best"))
    with pytest.raises(UserError, match="multiple of 16"):
        generate(sd, "a", size=24)


def test_a_sampler_that_cannot_draw_on_the_noise_schedule_is_refused_before_weights_load(sd, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "zero-snr", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "scheduler" / "scheduler_config.json"
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(json.loads(path.read_text()) | zero))
    for name in SAMPLERS:
        if name == "pndm":
            with pytest.raises(UserError, match=r"sampler: pndm ignores rescale_betas_zero_snr .* the wrong noise"):
                generate(folder, "a", drawing=Drawing(sampler=name))
            continue
        how = drawing_of(Teacher(folder), Drawing(sampler=name))
        assert sampler_of(how.sampler, json.loads(path.read_text())).alphas_cumprod[-1] < 1e-6
    with pytest.raises(UserError, match=r"steps: lcm cannot draw in 60 steps .*choose another number or sampler"):
        generate(folder, "a", drawing=Drawing(steps=60, sampler="lcm"))


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc", "euler"])
def test_a_sampler_is_the_same_whatever_options_the_pipelines_own_has(sd, name) -> None:
    config = json.loads((sd / "scheduler" / "scheduler_config.json").read_text())
    options = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3}
    plain, given = (sampler_of(name, schedule) for schedule in (config, config | options))
    for sampler in (plain, given):
        sampler.set_timesteps(7)
    assert torch.equal(plain.timesteps, given.timesteps) and torch.equal(plain.sigmas, given.sigmas)
    assert name != "dpmsolver++" or given.config["algorithm_type"] == "dpmsolver++"


def test_fp16_only_teacher_opens(sd, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "half")
    DiffusionPipeline.from_pretrained(sd, torch_dtype=torch.float16).save_pretrained(tmp_path / "v", variant="fp16")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors").unlink()
        shutil.copy(tmp_path / "v" / part / f"{name}.fp16.safetensors", folder / part)
    teacher = Teacher(folder)
    assert teacher.unet.dtype == torch.float32
    assert len(generate(folder, "a", drawing=Drawing(steps=1))) == 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_student_of_a_half_precision_teacher_draws_when_opened_without_a_dtype(kind, request, tmp_path) -> None:
    """transformers uses the stored dtype by default, diffusers does not; a pipeline must have one."""
    source = DiffusionPipeline.from_pretrained(request.getfixturevalue(kind), torch_dtype=torch.float16)
    source.save_pretrained(tmp_path / "half")
    teacher = Teacher(tmp_path / "half")
    export(teacher, build(teacher, load_plan("bk-base" if kind == "sd" else "vega")), tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe("a cat", num_inference_steps=1, height=16, width=16, output_type="np").images.shape == (1, 16, 16, 3)


def test_ddim_does_not_clip_latents(opened) -> None:
    """diffusers' default clips, if the config of the previous sampler has no value."""
    pipe = set_sampler(opened.pipeline(), "euler")
    assert set_sampler(pipe, "ddim").scheduler.config.clip_sample is False


def test_a_teacher_without_a_vocabulary_is_refused(sd, tmp_path) -> None:
    """Without its vocabulary a tokenizer gives the same tokens for every text, and no other check finds this."""
    folder = shutil.copytree(sd, tmp_path / "teacher")
    before = Teacher(folder).fingerprint(["text_encoder"])
    words = folder / "tokenizer" / "tokenizer.json"
    value = json.loads(words.read_text())
    value["model"]["vocab"] = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    words.write_text(json.dumps(value))
    assert Teacher(folder).fingerprint(["text_encoder"]) != before
    with pytest.raises(UserError, match="its tokenizer gives the same tokens for all words"):
        Teacher(folder).encode_prompts(["a cat"])
    for file in (folder / "tokenizer").iterdir():
        if file.name in ("tokenizer.json", "vocab.json", "merges.txt"):
            file.unlink()
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer" / "merges.txt").touch()  # cut off before its first line
    with pytest.raises(UserError, match=r"tokenizer: no vocab.json and merges.txt"):
        Teacher(folder).check_weights()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels: Input should be a valid list"),
        ("unet/config.json", {"block_out_channels": 5}, "block_out_channels: Input should be a valid list"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "its latents have latents_mean"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "trained for FlowMatch",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "steep"}, "makes no DDPMScheduler"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": "x"},
            "num_train_timesteps: Input should be a valid int",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DConditionModel"}, "is not one of diffusers'"),
    ],
)
def test_a_config_that_cannot_make_a_teacher_is_one_line(sd, tmp_path, file, change, message) -> None:
    folder = shutil.copytree(sd, tmp_path / "teacher")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        teacher = Teacher(folder)
        _ = teacher.noise_scheduler
        teacher.pipeline(unet=None, vae=None)
    assert "\n" not in str(error.value)


def test_sharded_parts_are_one_model(sd, opened, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "sharded")
    unet = opened.unet
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert state_hash(Teacher(folder).unet) == state_hash(unet)
    before = Teacher(folder).fingerprint(["unet"])
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\x01")
    assert Teacher(folder).fingerprint(["unet"]) != before
    shards[-1].write_bytes(b"")
    with pytest.raises(UserError, match="cut off"):
        Teacher(folder).check_weights()


def test_tokens_of_a_text_are_part_of_the_fingerprint(sd, sdxl, tmp_path) -> None:
    """Another fill or length changes the tokens like another vocabulary; usual ones are as if they were not said."""
    folder = Path(shutil.copytree(sd, tmp_path / "sd"))
    config, special = (folder / "tokenizer" / name for name in ("tokenizer_config.json", "special_tokens_map.json"))

    def now(parts: list[str] | None = None) -> str:
        return Teacher(folder).fingerprint(parts)

    own = json.loads(config.read_text()) if config.is_file() else {}
    usual, unet = now(), now(["unet"])
    found = {usual}
    for change in ({"pad_token": "!"}, {"pad_token": {"content": "?"}}, {"model_max_length": 8}):
        config.write_text(json.dumps(own | change))
        found.add(now())
        assert now(["unet"]) == unet
    config.write_text(json.dumps(own | {"pad_token": "!"}))
    special.write_text(json.dumps({"pad_token": {"content": "<|endoftext|>", "lstrip": False}}))
    assert len(found) == 4 and now() == usual
    wide = {"hidden_size": 1024, "max_position_embeddings": 77}  # as SD v2's and SDXL's second
    assert unusual_tokens(folder / "tokenizer", wide) == {"pad_token": "<|endoftext|>"}
