"""An IP-Adapter of the teacher for the student: its file numbers the attentions, and prunet numbers them again."""

import re
from collections.abc import Mapping, Sequence

from prunet.adapters.carried import Carried
from prunet.adapters.lora import check_layers
from prunet.adapters.names import shapes
from prunet.denoisers.form import teacher_name
from prunet.errors import UserError
from prunet.plan.derived import Derived
from prunet.teacher.placing import Header

IMAGE = "image_proj."
#: The number counts the attentions of the U-Net. FaceID's files also contain a LoRA for each attention.
_KEY = re.compile(r"ip_adapter\.(0|[1-9]\d{0,5})\.(?:(to_[kv])_ip\.weight|(to_[qkv]|to_out)_lora\.(down|up)\.weight)")
MODELS = "give an IP-Adapter that was made for the student's teacher"


def is_ip_adapter(keys: Sequence[str]) -> bool:
    """Returns whether the names of tensors are those of an IP-Adapter."""
    return any(key.startswith((IMAGE, "ip_adapter.")) for key in keys)


def carry_ip_adapter(found: Mapping[str, Header], metadata: Mapping[str, str], derived: Derived) -> Carried:
    """Maps the keys of an IP-Adapter's file to those for the student; the projection of the image embedding stays.

    Raises:
        UserError: the file is for another model, or a tensor is missing.
    """
    weights, nets = shapes(derived), (derived.teacher_skeleton, derived.student_skeleton)
    theirs, ours = map(derived.architecture.adapters.attentions, nets)
    places = {teacher_name(name, derived.form.module_map): place for place, name in enumerate(ours)}
    names = {key: key for key in found if key.startswith(IMAGE)}
    attentions: dict[str, set[str]] = {}  # for each attention of the teacher its layers for the image
    lora: dict[str, dict[str, Header]] = {}
    for key in sorted(found.keys() - names.keys()):
        read = _KEY.fullmatch(key)
        if read is None:
            raise UserError(f"{key} does not belong to an IP-Adapter: give a file with only an IP-Adapter")
        if int(read[1]) >= len(theirs):
            raise UserError(f"{key} names an attention that the teacher does not have, out of {len(theirs)}: {MODELS}")
        attention = theirs[int(read[1])]
        if attention in places:
            names[key] = f"ip_adapter.{places[attention]}.{key.split('.', 2)[2]}"
        if read[2] is None:
            layer = f"{attention}.{read[3]}" + (".0" if read[3] == "to_out" else "")
            lora.setdefault(layer, {})[read[4]] = found[key]
            continue
        attentions.setdefault(attention, set()).add(read[2])
        if found[key].shape != weights[f"{attention}.{read[2]}"]:
            has, wants = list(found[key].shape), list(weights[f"{attention}.{read[2]}"])
            raise UserError(f"{key} is {has}, its attention in the teacher ({attention}) has {wants}: {MODELS}")
    check_layers(lora, weights)
    crossed = theirs[1::2]  # each transformer block has a self-attention first, then the cross-attention
    if lacking := next((name for name in crossed if attentions.get(name) != {"to_k", "to_v"}), None):
        raise UserError(f"it has no keys and values of the image for {lacking}: {MODELS}")
    if not any(key.startswith(IMAGE) for key in names):
        raise UserError(f"it has no {IMAGE}*, the projection of the image's embedding: fetch or copy it again")
    kept, dropped = sorted(attentions.keys() & places), sorted(attentions.keys() - places)
    return Carried("IP-Adapter", names, kept, dropped, metadata)
