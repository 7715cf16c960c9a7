"""The blocks that stay, and the weight map of a transformer's student."""

from collections.abc import Mapping

from torch import nn

from prunet.denoisers.form import teacher_name
from prunet.denoisers.patterns import is_within
from prunet.errors import UserError


def kept_blocks(
    lists: Mapping[str, tuple[str, ...]], counts: Mapping[str, int], removed: Mapping[str, str]
) -> dict[str, list[int]]:
    """Maps each list to the numbers of its blocks that stay.

    Args:
        lists: maps each config field to the lists with this length.
        counts: the number of blocks of each list.
        removed: maps each removed block to its pattern.

    Raises:
        UserError: a list would be empty, or lists that share a config field would have different lengths.
    """
    kept = {name: [i for i in range(count) if f"{name}.{i}" not in removed] for name, count in counts.items()}
    if empty := next((name for name, ids in kept.items() if not ids), None):
        raise UserError(f"Pattern {removed[f'{empty}.0']!r} leaves no block of {empty}: at least one must stay")
    for field, names in lists.items():
        left = {name: len(kept[name]) for name in names}
        if len(set(left.values())) > 1:
            said = " and ".join(f"{count} of {name}" for name, count in left.items())
            raise UserError(
                f"The plan leaves {said}; diffusers has one number for both ({field}): remove equally many from each"
            )
    return kept


def weight_map(
    teacher: nn.Module, student: nn.Module, mapping: Mapping[str, str], removed: Mapping[str, str]
) -> dict[str, str]:
    """Maps each parameter of the student to one of the teacher.

    Raises:
        UserError: a parameter of the student has no origin, or one of the teacher's that is not removed has no place.
    """
    source = teacher.state_dict()
    out = {name: teacher_name(name, mapping) for name in student.state_dict()}
    for name, tensor in student.state_dict().items():
        if (origin := source.get(out[name])) is None or origin.shape != tensor.shape:
            given = "nothing" if origin is None else f"{tuple(origin.shape)}"
            raise UserError(
                f"diffusers has no form for this plan: the student's {name} is {tuple(tensor.shape)}, and the teacher "
                f"has {given} for it ({out[name]}): keep {'.'.join(out[name].split('.')[:2])}"
            )
    used = set(out.values())
    if lost := next((name for name in source if name not in used and not is_within(name, set(removed))), None):
        raise UserError(f"diffusers has no form for this plan: the student has no place for {lost}")
    return out
