"""Matches the tensors in files with those of a model, one to one, or refuses the files.

In: a model on the meta device, and the headers of the safetensors files of a diffusers folder or of a single file. Out:
the place of each tensor, found without reading any. `fill` then reads all of them, so no weight of the model stays
random.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunet.disk.reading import check_permission
from prunet.errors import UserError

#: Parts of names that torch.compile, DataParallel, FSDP, activation checkpointing and PEFT add.
WRAPPED = re.compile(
    r"^base_model\.model\.|(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
#: Names in a VAE's attention before diffusers 0.18; later versions still read them.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
#: `text_model.`: whether a CLIP text encoder's names have it depends on the version and the class that wrote it.
TEXT_MODEL = re.compile(r"^(.*\.transformer\.|)(text_model\.)?(?=embeddings\.|encoder\.|final_layer_norm\.)")
#: Constants that the model makes itself, and tensors that no program needs to draw.
HARMLESS = re.compile(
    r"(^|\.)(position_ids|logit_scale|attn_mask|text_projection|text_projection\.weight)$"
    r"|^(vision_model|visual_projection|first_stage_model\.(loss|model_ema)|cond_stage_model\.model\.visual)\."
    r"|^cond_stage_model\.model\.transformer\.resblocks\.23\."  # SD v2 uses the output of the layer before
)
SCALE = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|weight_scale_inv|input_scale|comfy_quant)$"
)
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


class Header(NamedTuple):
    """A tensor in a file that is not read yet; `dtype` is safetensors' name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Placed:
    """The places of all tensors of a model."""

    what: str  # the model's class
    places: Mapping[str, tuple[Path, str]]  # for each name in the model: file, and key in the file
    renamed: Mapping[str, str]  # the names that keys unknown to stock diffusers stand for
    unpack: Callable[[str, str, Tensor], Tensor]  # see `place`


def as_it_is(key: str, name: str, tensor: Tensor) -> Tensor:
    """The `unpack` of files that store tensors as the model has them."""
    return tensor


def empty(cls: Any, config: Any, where: str = "The config") -> Any:
    """Makes a model on the meta device, from a diffusers class and a mapping or a transformers class and its config.

    `from_config` is not used, because it ignores a None that replaces a default. Unknown keys are also ignored here.

    Raises:
        UserError: the config makes no such model; `where` begins the message.
    """
    try:
        if not isinstance(config, Mapping):
            with init_empty_weights():  # keeps buffers real, unlike the meta device; files have no position_ids
                return cls(config).eval()
        with torch.device("meta"):
            return cls(**known_fields(cls, config)).eval()
    except Exception as error:  # any type of error, since the libraries do not check the values
        raise UserError(f"{where} makes no {cls.__name__} ({type(error).__name__}: {error})") from error


def known_fields(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that a diffusers class knows; diffusers also ignores fields of other versions."""
    fields = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in config.items() if key in fields}


def open_file(path: str | Path) -> Any:
    """Opens a safetensors file and reads its header.

    Raises:
        UserError: the file is missing or damaged, or this user may not read it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} cannot be opened (no such file): pass a .safetensors file")
    check_permission(Path(path))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be opened: cut off, damaged or not a .safetensors file ({error}): fetch or copy it again"
        ) from error


def headers(files: Iterable[Path]) -> dict[str, Header]:
    """Returns the headers of all tensors in the files of one part, by key.

    Raises:
        UserError: a file is damaged, or two files contain the same tensor.
    """
    found: dict[str, Header] = {}
    for path in files:
        header = _headers(path, path.stat().st_mtime_ns if path.is_file() else 0)
        if again := sorted(found.keys() & header.keys()):
            raise UserError(f"{path}: {again[0]} is in {found[again[0]].file.name} too: fetch or copy both again")
        found |= header
    return found


@lru_cache(maxsize=64)
def _headers(path: Path, modified_ns: int) -> dict[str, Header]:
    """Returns the headers of one file, cached for its several parts; `modified_ns` changes if the file is rewritten."""
    found: dict[str, Header] = {}
    with open_file(path) as file:
        for key in file.keys():  # noqa: SIM118
            piece = file.get_slice(key)
            found[key] = Header(path, tuple(piece.get_shape()), str(piece.get_dtype()))
    return found


@lru_cache(maxsize=2**15)
def bare(key: str) -> str:
    """Returns a tensor's name without the additions of `WRAPPED`."""
    return WRAPPED.sub("", key)


def _meanings(key: str) -> Iterator[str]:
    """Yields the names that a key may stand for, the most similar first."""
    yield (name := bare(key))
    yield TEXT_MODEL.sub(lambda root: root[1] + ("" if root[2] else "text_model."), name)
    yield name.removesuffix(".weight")  # `text_projection.weight` for OpenCLIP's `text_projection`
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    yield name


def place(
    model: nn.Module,
    found: Mapping[str, Header],
    *,
    key_map: Mapping[str, str] | None = None,
    unpack: Callable[[str, str, Tensor], Tensor] = as_it_is,
    stem: str = "",
    fix: str = "fetch or copy it again, with its own config",
) -> Placed:
    """Finds each tensor of `model` among the keys of files.

    Args:
        model: on the meta device.
        found: the headers of the files.
        key_map: maps names in the model to keys in the files; by default the names are the same.
        unpack: `unpack(key, name, tensor)` turns a tensor of a file into the model's; tried on shapes here.
        stem: only keys that begin with it belong to the model.
        fix: the advice in messages.

    Raises:
        UserError: a tensor is missing, left over, has another shape, or is not of plain floating-point numbers.
    """
    what, names = type(model).__name__, key_map or {name: name for name in model.state_dict()}
    ours = {key: header for key, header in found.items() if bare(key).startswith(stem)}
    where = next(iter((ours or found).values())).file if found else "The file"
    if stem and not ours:
        raise UserError(f"{where} has no {stem}* in it, which this {what} needs: give a whole checkpoint")
    if scale := next((key for key in sorted(found) if SCALE.search(key) and (key in ours or "." not in key)), None):
        raise UserError(
            f"{found[scale].file}: {scale} in it says that weights are stored scaled (fp8), which prunet does not "
            f"undo: give the {what} in half or full precision"
        )
    keys = {name: name for name in names.values() if name in ours}  # the key that stands for each name
    for key in sorted(ours.keys() - keys.keys()):
        if name := next((n for n in _meanings(key) if n in names.values() and n not in keys), None):
            keys[name] = key
    left = [key for key in sorted(ours.keys() - set(keys.values())) if not HARMLESS.search(bare(key))]
    if missing := [name for name in dict.fromkeys(names.values()) if name not in keys]:
        instead = f"; it has {left[0]} instead{_more(left)}" if left else ""
        raise UserError(f"{where} has no {missing[0]}, which this {what} needs{_more(missing)}{instead}: {fix}")
    for name, tensor in model.state_dict().items():
        _check_fit(name, tensor, keys[names[name]], ours, unpack, fix)
    if left:
        raise UserError(f"{ours[left[0]].file} has {left[0]}, for which this {what} has no place{_more(left)}: {fix}")
    places = {name: (ours[keys[key]].file, keys[key]) for name, key in names.items()}
    renamed = {key: name for name, key in keys.items() if key != name and (key_map or bare(key) != key)}
    return Placed(what, places, renamed, unpack)


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1:,} more" if len(names) > 1 else ""


def _check_fit(
    name: str, tensor: Tensor, key: str, found: Mapping[str, Header], unpack: Callable[..., Tensor], fix: str
) -> None:
    header = found[key]
    if header.dtype not in FLOATS:
        raise UserError(f"{header.file}: {key} is stored as {header.dtype}, not as floating-point numbers: {fix}")
    shape = unpack(key, name, torch.empty(header.shape, device="meta")).shape
    if shape != tensor.shape:
        raise UserError(f"{header.file}: {key} is {list(shape)}, not {list(tensor.shape)}: {fix}")


def fill(model: Any, placed: Placed) -> Any:
    """Reads all tensors of an empty model, in the files' dtypes, and returns the model."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_file(path)) for path in {path for path, _ in placed.places.values()}}
        state = {
            name: placed.unpack(key, name, files[path].get_tensor(key)) for name, (path, key) in placed.places.items()
        }
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_finite(placed: Placed) -> None:
    """Reads all tensors once and refuses NaN and infinity.

    Raises:
        UserError: a tensor has one of them, or cannot be read.
    """
    for path in sorted({path for path, _ in placed.places.values()}):
        with open_file(path) as file:
            for key in sorted({key for where, key in placed.places.values() if where == path}):
                if not is_finite(file.get_tensor(key)):
                    raise UserError(
                        f"{path}: {key} has NaN or infinity in it, so nothing can be computed with this "
                        f"{placed.what}: fetch or copy it again, or give another"
                    )


def is_finite(tensor: Tensor) -> bool:
    """Returns whether all numbers are finite, in one pass, with a copy only of 8-bit numbers."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.half()  # torch has no minimum and maximum of 8-bit numbers
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
