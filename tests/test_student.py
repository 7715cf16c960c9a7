"""The student inherits exactly, loads in stock diffusers, and leaves the teacher as it was."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from prunet import Plan, Teacher, UserError, build, derive, load_plan
from prunet.denoisers.freeze import freeze
from prunet.denoisers.unet2d.inputs import example_inputs
from prunet.student.student import compose, cut, state_hash

KINDS = [("sd", "bk-base"), ("sd", "bk-small"), ("sd", "bk-tiny")]
KINDS += [("sdxl", "ssd-1b"), ("sdxl", "vega"), ("sdxl_deep", "koala-1b"), ("sdxl_deep", "koala-700m")]


def run(net: torch.nn.Module) -> torch.Tensor:
    inputs = example_inputs(dict(net.config), 2)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(3))
    inputs["encoder_hidden_states"] += torch.linspace(-1, 1, inputs["encoder_hidden_states"].shape[-1])
    with torch.no_grad():
        return net(**inputs).sample


@pytest.mark.parametrize(("kind", "plan"), KINDS)
def test_reloaded_student_is_bit_equal(kind: str, plan: str, request, tmp_path) -> None:
    teacher = Teacher(request.getfixturevalue(kind))
    before = state_hash(teacher.unet)
    student = build(teacher, load_plan(plan))
    student.save_pretrained(tmp_path / "unet", safe_serialization=True)
    again = freeze(UNet2DConditionModel.from_pretrained(tmp_path / "unet"))
    assert torch.equal(run(student), run(again))
    assert state_hash(teacher.unet) == before
    assert all(tensor.is_contiguous() for tensor in student.state_dict().values())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_empty_plan_computes_the_teachers_bits(kind: str, request) -> None:
    teacher = Teacher(request.getfixturevalue(kind))
    student = build(teacher, Plan("none"))
    assert torch.equal(run(student), run(teacher.unet))
    ours, theirs = ({p.data_ptr() for p in net.parameters()} for net in (student, teacher.unet))
    assert not ours & theirs, "the student shares memory with the teacher"


@pytest.mark.parametrize(("kind", "plan"), KINDS)
def test_every_tensor_is_the_teachers(kind: str, plan: str, request) -> None:
    teacher = Teacher(request.getfixturevalue(kind))
    derived = derive(teacher.unet_config, load_plan(plan))
    source = teacher.unet.state_dict()
    for name, tensor in build(teacher, load_plan(plan)).state_dict().items():
        assert torch.equal(tensor, source[derived.weight_map[name]]), name


def test_state_hash_sees_one_bit() -> None:
    net = torch.nn.Linear(2, 2)
    before = state_hash(net)
    net.weight.data.view(torch.int32)[0, 0] ^= 1
    assert state_hash(net) != before


PATHS = [
    ("sd", ["bk-base", "bk-small", "bk-tiny"]),
    ("sdxl", ["ssd-1b", "vega"]),
    ("sdxl_deep", ["koala-1b", "koala-700m"]),
]


@pytest.mark.parametrize(("kind", "path"), PATHS)
def test_cut_step_by_step_is_cut_at_once(kind: str, path: list[str], request) -> None:
    """The composed weight map equals the direct one, as the weights show."""
    teacher = Teacher(request.getfixturevalue(kind))
    steps = [derive(teacher.unet_config, load_plan(name)) for name in path]
    student = build(teacher, load_plan(path[0]))
    for before, after in itertools.pairwise(steps):
        student = cut(student, before, after)
        assert {k: before.weight_map[v] for k, v in compose(before, after).items()} == after.weight_map
    assert state_hash(student) == state_hash(build(teacher, load_plan(path[-1])))


def test_part_that_comes_back_is_refused(sdxl) -> None:
    config = Teacher(sdxl).unet_config
    vega, ssd = (derive(config, load_plan(name)) for name in ("vega", "ssd-1b"))
    with pytest.raises(UserError, match=r"'ssd-1b' keeps .*'vega' of the stage before removed"):
        compose(vega, ssd)
