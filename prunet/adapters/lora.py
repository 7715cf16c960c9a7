"""A LoRA of the teacher for the student: layers are renamed, those of removed blocks dropped, numbers unchanged."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prunet.adapters.carried import Carried
from prunet.adapters.names import TEXT, Key, layers, read_key, shapes
from prunet.disk.reading import parse_json
from prunet.errors import UserError
from prunet.plan.derived import Derived
from prunet.teacher.placing import FLOATS, Header

#: Parts of keys that show another form than down and up matrices, and the name of that form.
OTHER_FORMS = {
    r"lora_magnitude_vector|dora_scale": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_|\.boft_": "OFT",
    r"\.lora_mid\.": "LoCon in Tucker's form",
    r"\.diff(_b)?$": "a difference of whole weights",
    r"\.lora_\w+(\.\w+)?\.bias$": "a LoRA with biases",
}
#: Hashes of the old file, in kohya's metadata and in that of the model specification.
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
#: Key of the metadata where diffusers keeps PEFT's config of each part.
PEFT = "lora_adapter_metadata"
MODELS = "give a LoRA that was made for the student's teacher"


def is_lora(keys: Sequence[str], part: str) -> bool:
    """Returns whether the names of tensors are those of a LoRA for `part`, in a form that prunet reads or knows."""
    return any(read_key(key, part) or re.search("|".join(OTHER_FORMS), key) for key in keys)


def carry_lora(found: Mapping[str, Header], metadata: Mapping[str, str], derived: Derived) -> Carried:
    """Returns keys and metadata of a LoRA's file for the student. Alphas, ranks and text encoders stay the same.

    Raises:
        UserError: the LoRA has another form or is for another model, lacks half of a layer, or would be empty.
    """
    part, known = derived.architecture.part, layers(derived)
    names = {key: key for key in found if TEXT.match(key)}
    pieces: dict[str, dict[str, Header]] = {}  # for each layer of the teacher: down, up, alpha
    here: dict[str, str] = {}  # for each layer of the teacher: the student's
    for key in sorted(found.keys() - names.keys()):
        prefix, written, suffix, role = _read(key, part)
        if written not in known:
            raise UserError(f"{key} names a layer that the teacher does not have: {MODELS}")
        layer = known[written]
        if role in pieces.setdefault(layer.module, {}):
            raise UserError(f"{key} is there twice, in two formats: give a file with one of them")
        pieces[layer.module][role] = found[key]
        if layer.name is not None and layer.here is not None:
            names[key], here[layer.module] = prefix + layer.name + suffix, layer.here
    check_layers(pieces, shapes(derived))
    if not pieces:
        raise UserError("it changes only text encoders, which the student shares with its teacher: load it as it is")
    if not here:
        raise UserError(f"all {len(pieces)} layers that it changes are gone: the student has no place for it")
    said = {key: value for key, value in metadata.items() if key not in HASHES}
    if PEFT in said:
        kept = {module: (name, pieces[module]["down"].shape[0]) for module, name in here.items()}
        said[PEFT] = _peft_config(said[PEFT], part, kept)
    return Carried("LoRA", names, sorted(here), sorted(pieces.keys() - here.keys()), said)


def _read(key: str, part: str) -> Key:
    for pattern, form in OTHER_FORMS.items():
        if re.search(pattern, key):
            raise UserError(f"{key} belongs to {form}, which prunet cannot carry over: give a plain LoRA")
    read = read_key(key, part)
    if read is None:
        raise UserError(f"{key} does not belong to a LoRA: give a file with only a LoRA")
    return read


def check_layers(pieces: Mapping[str, Mapping[str, Header]], weights: Mapping[str, tuple[int, ...]]) -> None:
    """Checks down (r, in, ...) and up (out, r, ...) of each layer; their product must fit the teacher's weight."""
    for module, roles in pieces.items():
        if missing := {"down", "up"} - roles.keys():
            raise UserError(f"{module}: its {missing.pop()} is missing in the file: fetch or copy it again")
        if wrong := next((header.dtype for header in roles.values() if header.dtype not in FLOATS), None):
            raise UserError(f"{module} is stored as {wrong}, not as floating-point numbers: {MODELS}")
        down, up, weight = roles["down"].shape, roles["up"].shape, weights[module]
        if len(weight) < 2 or not down or len(up) < 2:
            raise UserError(f"{module} is not a layer that a LoRA can change: {MODELS}")
        product = up[0], math.prod(up[1:]), down[0], math.prod(down[1:])
        if product != (weight[0], down[0], down[0], math.prod(weight[1:])):
            raise UserError(
                f"{module}: its down {list(down)} and up {list(up)} do not fit the teacher's weight {list(weight)}: "
                f"{MODELS}"
            )
        if "alpha" in roles and math.prod(roles["alpha"].shape) != 1:
            raise UserError(f"{module}: its alpha is not a single number: fetch or copy it again")


def _peft_config(text: str, part: str, kept: Mapping[str, tuple[str, int]]) -> str:
    """Returns PEFT's config for the student, as JSON, with rank and alpha of each layer under its new name.

    `kept`: new name and rank for each layer of the teacher.
    """
    try:
        config = parse_json(text)
        own = {key: value for key, value in config.items() if key.startswith(f"{part}.")}
        usual, patterns = own.get(f"{part}.lora_alpha"), own.get(f"{part}.alpha_pattern") or {}
        alphas = {new: _of_pattern(module, patterns, usual) for module, (new, _) in kept.items()}
        if odd := [alpha for alpha in alphas.values() if own and not (_is_number(alpha) and math.isfinite(alpha))]:
            raise ValueError(f"alpha {odd[0]!r}")
        if more := next((f for f in ("use_dora", "lora_bias", "modules_to_save") if own.get(f"{part}.{f}")), None):
            raise UserError(f"its metadata have {more}, which prunet cannot carry over: give a plain LoRA")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"its metadata {PEFT} are not a config of PEFT ({error}): fetch or copy it again") from error
    if own:
        for field, pattern, values in (
            ("r", "rank_pattern", dict(kept.values())),
            ("lora_alpha", "alpha_pattern", alphas),
        ):
            config[f"{part}.{field}"] = most = Counter(values.values()).most_common(1)[0][0]
            config[f"{part}.{pattern}"] = {new: value for new, value in values.items() if value != most}
        config[f"{part}.target_modules"] = sorted(alphas)
        config |= {key: None for key in (f"{part}.exclude_modules", f"{part}.layers_to_transform") if key in config}
    return json.dumps(config, indent=2, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_pattern(module: str, patterns: Mapping[str, Any], usual: Any) -> Any:
    """Applies PEFT's rule: a pattern matches the end of a layer's name."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if f".{module}".endswith(f".{name}"):
            return value
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"the pattern {pattern!r}")
    return usual
