"""A LoRA of the teacher for the student: layers renamed, those of removed blocks dropped, numbers as they are."""

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

#: What only a file has that changes layers in another way than by down and up -> the name of that way.
OTHER_FORMS = {
    r"lora_magnitude_vector|dora_scale": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_|\.boft_": "OFT",
    r"\.lora_mid\.": "LoCon in Tucker's form",
    r"\.diff(_b)?$": "a difference of whole weights",
    r"\.lora_\w+(\.\w+)?\.bias$": "a LoRA with biases",
}
#: Hashes of what the file was, in kohya's metadata and in that of the model specification.
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
#: Where diffusers keeps PEFT's config of each part.
PEFT = "lora_adapter_metadata"
MODELS = "give a LoRA that was made for the student's teacher"


def is_lora(keys: Sequence[str], part: str) -> bool:
    """Returns whether the names of tensors are those of a LoRA for `part`, in a form that prunet reads or knows."""
    return any(read_key(key, part) or re.search("|".join(OTHER_FORMS), key) for key in keys)


def carry_lora(found: Mapping[str, Header], metadata: Mapping[str, str], derived: Derived) -> Carried:
    """The keys and the metadata of a LoRA's file for the student. Alphas, ranks and what a text encoder has stay.

    Raises:
        UserError: of another form or for another model, half of a layer is missing, or nothing of it is left.
    """
    part, known = derived.architecture.part, layers(derived)
    names = {key: key for key in found if TEXT.match(key)}
    pieces: dict[str, dict[str, Header]] = {}  # layer of the teacher -> down, up, alpha
    here: dict[str, str] = {}  # layer of the teacher -> the student's
    for key in sorted(found.keys() - names.keys()):
        prefix, written, suffix, role = _read(key, part)
        if written not in known:
            raise UserError(f"{key} is of no layer of the teacher: {MODELS}")
        layer = known[written]
        if role in pieces.setdefault(layer.module, {}):
            raise UserError(f"{key} is there twice, in two formats: give a file with one of them")
        pieces[layer.module][role] = found[key]
        if layer.name is not None and layer.here is not None:
            names[key], here[layer.module] = prefix + layer.name + suffix, layer.here
    check_layers(pieces, shapes(derived))
    if not pieces:
        raise UserError("it changes text encoders alone, which the student has unchanged: load it as it is")
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
            raise UserError(f"{key} is of {form}, which has no form for a student here: give a plain LoRA")
    read = read_key(key, part)
    if read is None:
        raise UserError(f"{key} is no part of a LoRA: give a file with a LoRA alone")
    return read


def check_layers(pieces: Mapping[str, Mapping[str, Header]], weights: Mapping[str, tuple[int, ...]]) -> None:
    """Each layer has down (r, in, ...) and up (out, r, ...), whose product has the size of the teacher's weight."""
    for module, roles in pieces.items():
        if missing := {"down", "up"} - roles.keys():
            raise UserError(f"{module}: its {missing.pop()} is missing in the file: fetch or copy it again")
        if wrong := next((header.dtype for header in roles.values() if header.dtype not in FLOATS), None):
            raise UserError(f"{module} is stored as {wrong}, not as floating-point numbers: {MODELS}")
        down, up, weight = roles["down"].shape, roles["up"].shape, weights[module]
        if len(weight) < 2 or not down or len(up) < 2:
            raise UserError(f"{module} is no layer that a LoRA changes: {MODELS}")
        product = up[0], math.prod(up[1:]), down[0], math.prod(down[1:])
        if product != (weight[0], down[0], down[0], math.prod(weight[1:])):
            raise UserError(
                f"{module}: its down {list(down)} and up {list(up)} do not fit the teacher's weight {list(weight)}: "
                f"{MODELS}"
            )
        if "alpha" in roles and math.prod(roles["alpha"].shape) != 1:
            raise UserError(f"{module}: its alpha is no single number: fetch or copy it again")


def _peft_config(text: str, part: str, kept: Mapping[str, tuple[str, int]]) -> str:
    """PEFT's config for the student, as JSON: for each layer rank and alpha of the teacher's, by its new name.

    `kept`: layer of the teacher -> its new name and its rank.
    """
    try:
        config = parse_json(text)
        own = {key: value for key, value in config.items() if key.startswith(f"{part}.")}
        usual, patterns = own.get(f"{part}.lora_alpha"), own.get(f"{part}.alpha_pattern") or {}
        alphas = {new: _of_pattern(module, patterns, usual) for module, (new, _) in kept.items()}
        if odd := [alpha for alpha in alphas.values() if own and not (_is_number(alpha) and math.isfinite(alpha))]:
            raise ValueError(f"alpha {odd[0]!r}")
        if more := next((f for f in ("use_dora", "lora_bias", "modules_to_save") if own.get(f"{part}.{f}")), None):
            raise UserError(f"its metadata say {more}, which has no form for a student here: give a plain LoRA")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"its metadata {PEFT} are no config of PEFT's ({error}): fetch or copy it again") from error
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
    """PEFT's rule: a pattern is the end of a layer's name."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if f".{module}".endswith(f".{name}"):
            return value
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"the pattern {pattern!r}")
    return usual
