"""The student: a stock denoiser made from a plan, with the weights that it inherits from the teacher."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunet.denoisers.architecture import Net
from prunet.errors import UserError
from prunet.hashing import hash_of
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import Plan
from prunet.recipe.recipe import Recipe
from prunet.teacher.teacher import Teacher


def build(teacher: Teacher, plan: Plan) -> Net:
    """Builds the plan's student, a stock model in fp32, with weights copied from the teacher.

    The teacher does not change. An empty plan gives a copy that computes the same bits.

    Raises:
        UserError: the plan does not fit the teacher (see `prunet.plan.derived.derive`).
    """
    return inherit(teacher.unet, derive(teacher.unet_config, plan))


def inherit(source: nn.Module, derived: Derived) -> Net:
    """Builds the student of `derived` with weights copied from `source`, the teacher's denoiser."""
    return _fill(derived, _copied(source, derived.weight_map.values()), derived.weight_map)


def sharing(source: nn.Module, derived: Derived) -> Net:
    """Builds the student of `derived` from the tensors of `source` themselves: only to call it, without a copy."""
    return _fill(derived, source.state_dict(), derived.weight_map)


def random_student(derived: Derived, seed: int) -> Net:
    """Builds the student of `derived` with random weights, for a comparison with inherited ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return derived.architecture.make(derived.student_config).eval().requires_grad_(False)


def _copied(source: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns copies of these weights, in fp32 on the CPU."""
    weights = source.state_dict()
    return {name: weights[name].to("cpu", torch.float32, copy=True).contiguous() for name in names}


def _fill(derived: Derived, weights: Mapping[str, Tensor], origins: Mapping[str, str]) -> Net:
    """Makes the student without weights and assigns them, so that no time is spent on random weights."""
    student = derived.architecture.empty(derived.student_config)
    student.load_state_dict(
        {name: weights[origin] for name, origin in origins.items()}
        | {name: torch.zeros(student.get_parameter(name).shape) for name in derived.form.new if name not in origins},
        assign=True,
    )
    return student.eval().requires_grad_(False)


def compose(before: Derived, after: Derived) -> dict[str, str]:
    """Maps each parameter of `after`'s student to a parameter of `before`'s student, through the teacher's names.

    Raises:
        UserError: `after` keeps a part that `before` removed.
    """
    ours = {origin: name for name, origin in before.weight_map.items()}
    lost = next((origin for origin in after.weight_map.values() if origin not in ours), None)
    if lost is not None:
        raise UserError(
            f"plan {after.plan.name!r} keeps {lost}, which plan {before.plan.name!r} of the stage before removed: "
            "remove it in the later plan too"
        )
    kept = {name: name for name in after.form.new if name in before.form.new}
    return {name: ours[origin] for name, origin in after.weight_map.items()} | kept


def derive_stages(config: Mapping[str, Any], recipe: Recipe) -> tuple[Derived, list[Derived]]:
    """Derives the recipe's student and that of each stage from the teacher's config.

    Raises:
        UserError: a plan does not fit the teacher.
    """
    plans = zip(recipe.stage_plans, recipe.stages, strict=True)
    stages = [derive(config, plan, guidance=stage.guidance_range is not None) for plan, stage in plans]
    return derive(config, recipe.plan, guidance=bool(stages[-1].form.new)), stages


def check_steps(steps: Sequence[Derived]) -> None:
    """Refuses plans if a later one keeps what an earlier one removed."""
    for before, after in itertools.pairwise(steps):
        compose(before, after)


def cut(student: nn.Module, before: Derived, after: Derived) -> Net:
    """Builds the student of `after` from `student`, the student of the earlier plan `before`."""
    origins = compose(before, after)
    return _fill(after, _copied(student, origins.values()), origins)


def state_hash(module: nn.Module) -> str:
    """Hashes every parameter and buffer, bit for bit, with names, shapes and dtypes."""

    def pieces() -> Iterator[bytes]:
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()

    return hash_of(pieces())[:16]
