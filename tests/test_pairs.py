"""Pairs at every level: how many, what they compare, and the 26-term loss against one written from the formula."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from test_plan import plan_of
from torch.utils.data import default_collate

from prunet import Teacher, UserError, build, derive, distil, load_plan
from prunet.data.encoding import cache
from prunet.denoisers.architecture import check_shapes
from prunet.denoisers.pairs import LEVELS, Pair, term_factors
from prunet.denoisers.unet2d.architecture import UNET2D
from prunet.recipe.recipe import Data, Losses, Stage
from prunet.runtime import Runtime
from prunet.training.samples import Samples

PRESETS = [
    ("sd-v1", "bk-base"),
    ("sd-v1", "bk-small"),
    ("sd-v1", "bk-tiny"),
    ("sdxl", "ssd-1b"),
    ("sdxl", "vega"),
    ("sdxl", "koala-1b"),
    ("sdxl", "koala-700m"),
]


@pytest.mark.parametrize("name", ["ssd-1b", "vega"])
def test_layer_level_has_the_26_terms_of_ssd_1b(name: str) -> None:
    """6 + 9 resnets, 4 + 6 transformers, and the teacher's mid stage with what is left of it."""
    down = [f"down_blocks.{i}.resnets.{j}" for i in range(3) for j in range(2)]
    up = [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)]
    attentions = [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2)]
    attentions += [f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in range(3)]
    names = {*down, *up, *attentions, "mid_block"}
    pairs = plan_of("sdxl", name).pairs("layer")
    assert len(pairs) == len(names) == 26
    assert {(p.student, p.teacher) for p in pairs} == {(name, name) for name in names}


def test_attention_level_has_every_kept_block_and_a_stand_in_where_there_is_none() -> None:
    pairs = plan_of("sdxl", "koala-700m").pairs("attention")
    blocks = [p for p in pairs if p.student.endswith(".attn1")]
    assert len(blocks) == 2 + 5 + 2 * 5 + 2 * 2  # one attention on the way down, two on the way up; 2 and 5 blocks
    stand_ins = {(p.student, p.teacher) for p in pairs if p not in blocks}
    assert stand_ins == {
        ("down_blocks.0.resnets.0", "down_blocks.0.resnets.0"),
        ("up_blocks.2.resnets.1", "up_blocks.2.resnets.2"),
    }


@pytest.mark.parametrize(("layout", "name"), PRESETS)
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "block"])
def test_pairs_below_the_stages_follow_the_weight_map(layout: str, name: str, level: str) -> None:
    derived = plan_of(layout, name)
    pairs = derived.pairs(level)
    assert len({p.student for p in pairs}) == len({p.teacher for p in pairs}) == len(pairs) > 8
    for pair in pairs:
        inside = [(s, t) for s, t in derived.weight_map.items() if s.startswith(f"{pair.student}.")]
        assert inside
        if pair.student != "mid_block":
            assert all(t.startswith(f"{pair.teacher}.") for _, t in inside)


def test_pair_of_two_shapes_is_refused() -> None:
    """The stage output of bk-tiny that lost its downsampler, against the teacher's that has one."""
    derived = plan_of("sd-v1", "bk-tiny")
    with pytest.raises(UserError, match=r"\(1280, 16, 16\).*\(1280, 8, 8\)"):
        check_shapes(UNET2D, derived.teacher_config, derived.student_config, [Pair("down_blocks.2", "down_blocks.2")])


def test_factor_is_that_of_the_last_pattern_around_the_module() -> None:
    pairs = plan_of("sdxl", "vega").pairs("layer")
    factors = dict(zip(pairs, term_factors(pairs, {"up_blocks.*": 2.0, "up_blocks.0.attentions.*": 0.5}), strict=True))
    assert factors[Pair("up_blocks.1.resnets.0", "up_blocks.1.resnets.0")] == 2.0
    assert factors[Pair("up_blocks.0.attentions.2", "up_blocks.0.attentions.2")] == 0.5
    assert factors[Pair("down_blocks.0.resnets.0", "down_blocks.0.resnets.0")] == 1.0
    with pytest.raises(UserError, match="matches no module"):
        term_factors(pairs, {"up_blocks.7": 1.0})


def test_the_26_term_loss_is_the_formula(sdxl, pictures, tmp_path) -> None:
    """Written a second time from the paper: own hooks, own names, diffusers' scheduler, on the first batch of a run."""
    teacher, plan = Teacher(sdxl), load_plan("ssd-1b")
    made = cache(teacher, Data(source=str(pictures)), tmp_path / "cache", seed=1)
    student = build(teacher, plan)
    losses = Losses(task=1.0, output=0.5, feature=0.5, level="layer")
    plain = Stage(steps=1, batch_size=3, losses=losses, caption_dropout=0.0, warmup_steps=0, ema_decay=None)

    samples = Samples(made, plain, 5, teacher.process)
    batch = default_collate([samples[0, position] for position in range(3)])
    noisy = DDPMScheduler.from_pretrained(sdxl / "scheduler").add_noise(
        batch["latents"], batch["noise"], batch["timestep"]
    )
    known = batch["condition"]
    added = {"text_embeds": known["pooled"], "time_ids": known["time_ids"]}
    kept: dict[str, dict[str, torch.Tensor]] = {"student": {}, "teacher": {}}
    for side, net in (("student", student), ("teacher", teacher.unet)):
        for name, module in net.named_modules():
            if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel") or name == "mid_block":

                def keep(module, inputs, output, side=side, name=name):
                    kept[side][name] = output[0] if isinstance(output, tuple) else output

                module.register_forward_hook(keep)
    with torch.no_grad():
        ours, theirs = (
            net(noisy, batch["timestep"], known["prompt_embeds"], added_cond_kwargs=added).sample
            for net in (student, teacher.unet)
        )
    terms: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for name, feature in kept["student"].items():
        if name.startswith("mid_block.resnets"):
            continue
        target = kept["teacher"][name]
        terms[False].append(F.mse_loss(feature, target))
        each = [((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(feature, target, strict=True)]
        terms[True].append(sum(each) / 3)  # each sample by its own power

    pairs = derive(teacher.unet_config, plan).pairs("layer")
    runtime = Runtime(device="cpu", precision="no", log_every=1)
    teacher = Teacher(sdxl)  # without those hooks
    for normalize, of_pairs in terms.items():
        assert len(of_pairs) == 26
        expected = F.mse_loss(ours, batch["noise"]) + 0.5 * F.mse_loss(ours, theirs) + 0.5 * sum(of_pairs)
        stage = plain.model_copy(update={"losses": losses.model_copy(update={"normalize": normalize})})
        folder = tmp_path / f"normalized-{normalize}"
        distil(teacher, build(teacher, plan), pairs, made, stage, folder, seed=5, runtime=runtime)
        row = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert len([key for key in row if key.startswith("feature/")]) == 26
