"""One function for all kinds of adapters: recognises the file, carries it over, and writes the new one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from prunet.adapters import controlnet, ip_adapter, lora
from prunet.adapters.carried import Carried
from prunet.adapters.lora_file import PERSONALIZED
from prunet.denoisers.architecture import ATTENTION_LAYERS
from prunet.denoisers.known import architecture_of
from prunet.disk.files import check_writable, new_file
from prunet.disk.ownership import check_file, check_place
from prunet.errors import UserError
from prunet.plan.derived import Derived, derive
from prunet.plan.plan import parse_plan
from prunet.plan.result import PlanResult
from prunet.teacher import placing
from prunet.teacher.configs import check_config
from prunet.teacher.pickles import PICKLES
from prunet.words import command, short

#: Key in the metadata of a file that was carried over; its value names the run and the plan.
MARK = "prunet.adapted"
#: The name under which diffusers looks for a LoRA in a folder.
LORA_FILE = "pytorch_lora_weights.safetensors"
KINDS = "a LoRA or an IP-Adapter (a .safetensors file), or a ControlNet (its diffusers folder)"


def adapt(file: Path | str, to: Path | str | Derived, output: Path | str | None = None) -> dict[str, Any]:
    """Carries a LoRA, an IP-Adapter or a ControlNet of the teacher over to a student, by its plan.

    Args:
        file: a LoRA's or IP-Adapter's `.safetensors`, or the diffusers folder of a ControlNet.
        to: the run folder, or another one with the run's `plan.json`; without it, the plan as `derive` gives it for the
            teacher's config.
        output: the new file or folder; by default beside `file`, with the name of the run (or plan) at its end.

    Returns:
        `output`, `kind`, the name of the `plan`, and of the `run` if one is given. For a LoRA or IP-Adapter also the
        teacher's layers that were `kept` and `dropped`; for a ControlNet its `form` (`cut` or `whole`) and the
        `residuals` that are taken.

    Raises:
        UserError: the file is not an adapter, has a form that cannot be carried over, or is for another model.
    """
    source = Path(file)
    derived = to if isinstance(to, Derived) else _open_student(Path(to))
    run = {} if isinstance(to, Derived) else {"run": short(str(Path(to).resolve()))}
    mark = {**run, "plan": derived.plan.name, "from": source.name}
    if source.is_dir() and (source / LORA_FILE).is_file():
        source = source / LORA_FILE
    ending = "" if source.is_dir() else ".safetensors"
    stem = source.name.removesuffix(ending)
    target = Path(output) if output else source.with_name(f"{stem}-{run.get('run', derived.plan.name)}{ending}")
    if source.is_dir():
        check_place(target, "adapter", "--output", [source])
        control = controlnet.open_controlnet(source, derived)
        facts = controlnet.write_controlnet(control, derived, target, mark)
        fits = derived.works_with["the teacher's ControlNet"] == "yes"
        return {"output": str(target), "kind": "ControlNet", **facts, "fits_unchanged": fits}
    carried = carry(source, derived)
    if target.suffix != ".safetensors":
        raise UserError(f"--output {target}: not the name of the new file: give NAME.safetensors")
    check_file(target, "carried adapter", "--output", is_adapted, [source])
    check_writable(target.parent, "--output")
    _write(source, carried, target, mark)
    return {"output": str(target), "kind": carried.what, **mark, "kept": carried.kept, "dropped": carried.dropped}


def is_adapted(path: Path) -> bool:
    """Returns whether `adapt` wrote a file."""
    return MARK in _metadata(path)


def _open_student(folder: Path) -> Derived:
    path = folder / "plan.json"
    if not path.is_file():
        raise UserError(
            f"--to {folder}: no plan.json there, which lists the removed blocks: give the run folder of the student, "
            "or instead of --to its --teacher and --plan"
        )
    result = PlanResult.load(path)
    config = result.teacher_config
    check_config(architecture_of(config).part, config, path)
    derived = derive(config, parse_plan({"name": result.plan.name, "remove": list(result.plan.remove)}, str(path)))
    if derived.weight_map != result.weight_map:
        raise UserError(f"{path}: of another version of prunet: {command('run', folder)} writes it again")
    return derived


def carry(path: Path, derived: Derived) -> Carried:
    """Reads a LoRA or an IP-Adapter of the teacher, and decides which tensors stay under which names.

    Raises:
        UserError: the file is not an adapter, has a form that cannot be carried over, or is for another model.
    """
    if path.suffix in PICKLES:
        raise UserError(
            f"{path}: a pickle, which can contain code; {command('convert', path)} writes its tensors without it"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file: give {KINDS}")
    found, said = placing.headers([path]), _metadata(path)
    if MARK in said:
        raise UserError(f"{path}: carried over to a student already ({said[MARK]}): give the teacher's own file")
    try:
        if ip_adapter.is_ip_adapter(list(found)):
            return ip_adapter.carry_ip_adapter(found, said, derived)
        if lora.is_lora(list(found), derived.architecture.part):
            carried = lora.carry_lora(found, said, derived)
            _check_whole(carried, said, derived)
            return carried
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    first = next(iter(sorted(found)), "nothing")
    raise UserError(f"{path}: its tensors are not those of an adapter (the first is {first}): give {KINDS}")


def _check_whole(carried: Carried, said: Mapping[str, str], derived: Derived) -> None:
    """Refuses a LoRA that `prunet personalize` trained on a model with fewer attentions than the teacher."""
    layers = sum(name.endswith(ATTENTION_LAYERS) for name, _ in derived.teacher_skeleton.named_modules())
    if PERSONALIZED in said and len(carried.kept) + len(carried.dropped) != layers:
        model = json.loads(said[PERSONALIZED]).get("model")
        raise UserError(f"trained on a student ({model}), not on the teacher: load it on that student as it is")


def _metadata(path: Path) -> dict[str, str]:
    with placing.open_file(path) as file:
        return dict(file.metadata() or {})


def _write(source: Path, carried: Carried, target: Path, mark: dict[str, str]) -> None:
    with placing.open_file(source) as file:
        tensors = {new: file.get_tensor(key) for key, new in carried.names.items()}
    if bad := next((name for name, tensor in tensors.items() if not placing.is_finite(tensor)), None):
        raise UserError(f"{source}: {bad} has NaN or infinity in it: fetch or copy it again, or give another")
    with new_file(target) as part:
        save_file(tensors, part, metadata={**carried.metadata, MARK: json.dumps(mark)})
