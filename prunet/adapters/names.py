"""The names of a denoiser's layers in files of LoRAs, and the student's layer for each of them.

Four formats, in any mixture:

    unet.down_blocks.0.[...].to_q.lora_A.weight                PEFT's, which diffusers writes
    unet.down_blocks.0.[...].processor.to_q_lora.down.weight   diffusers' older ones (also: to_q.lora.down.weight)
    lora_unet_down_blocks_0_[...]_to_q.lora_down.weight        kohya's
    lora_unet_input_blocks_1_1_[...]_to_q.lora_down.weight     kohya's of SDXL: the original layout (SGM, LDM)
"""

import re
from typing import Any, NamedTuple

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.form import teacher_name
from prunet.plan.derived import Derived

#: Layers of text encoders, which a student shares with its teacher.
TEXT = re.compile(r"(base_model\.model\.)?(text_encoder(_\d)?\.|lora_te\d?_|te\d?\.)")
#: Suffixes after a layer's name.
_SUFFIX = re.compile(r"\.(?:lora(?:_linear_layer)?\.)?(?:lora_)?(A|B|down|up)(?:\.\w+)?\.weight\Z|\.alpha\Z")
_PREFIX = r"(?:base_model\.model\.)?(?:{part}\.|lora_{part}_|(?:model\.)?diffusion_model\.)?"
_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up", None: "alpha"}


class Key(NamedTuple):
    """A tensor's name in pieces; `prefix + layer + suffix` is the whole name."""

    prefix: str
    layer: str
    suffix: str
    role: str  # down, up or alpha


class Layer(NamedTuple):
    """A layer of the teacher, as named in a file."""

    module: str
    here: str | None  # the student's module that inherits from it; None: the layer is gone
    name: str | None  # the name of the student's module in the same format


def read_key(key: str, part: str) -> Key | None:
    """Splits a LoRA's key; None if it is not one. `part`: the denoiser's name in its pipeline (`unet`)."""
    found = _SUFFIX.search(key)
    if found is None:
        return None
    start = re.match(_PREFIX.format(part=part), key)
    end = start.end() if start else 0
    return Key(key[:end], key[end : found.start()], found[0], _ROLES[found[1]])


def layers(derived: Derived) -> dict[str, Layer]:
    """Maps every name that a file may use for a layer of the teacher to this layer."""
    forms, mapping = derived.architecture.adapters, derived.form.module_map
    theirs, ours = (_written(forms, net) for net in (derived.teacher_skeleton, derived.student_skeleton))
    if isinstance(derived.student_config.get("layers_per_block"), list):
        # diffusers then cannot read kohya's names of the original layout: its own names stand for them.
        ours = {name: (*names[:4], names[2]) for name, names in ours.items()}
    here: dict[str, tuple[str | None, ...]] = {teacher_name(m, mapping): names for m, names in ours.items()}
    found: dict[str, Layer] = {}
    for module, names in theirs.items():
        ours_now = here.get(module, (None,) * len(names))
        for name, new in zip(names, ours_now, strict=True):
            found.setdefault(name, Layer(module, ours_now[0], new))
    return found


def shapes(derived: Derived) -> dict[str, tuple[int, ...]]:
    """Maps each layer of the teacher that a LoRA may change to the shape of its weight."""
    return {name: tuple(module.weight.shape) for name, module in _layers(derived.teacher_skeleton)}


def _layers(net: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in net.named_modules() if getattr(module, "weight", None) is not None]


def _written(forms: AdapterForms, net: Any) -> dict[str, tuple[str, ...]]:
    """Maps each layer to its names, one for each format, always in the same order."""
    originals = forms.original_names(net)
    found: dict[str, tuple[str, ...]] = {}
    for name, _ in _layers(net):
        original = originals.get(name, name)
        older = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", name)
        found[name] = name, older, name.replace(".", "_"), original, original.replace(".", "_")
    return found
