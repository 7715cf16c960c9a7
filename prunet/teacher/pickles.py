"""Reads the tensors of a pickled checkpoint (`.ckpt`, `.pt`, `.bin`) without running the code in it.

A pickle is a program that imports names and calls them. Here each name becomes an inert stand-in, and names that make
a tensor become notes about the place of its bytes. Nothing is imported or called. The bytes are then read from
the file in PyTorch's layout: a zip of stored records, or (before PyTorch 1.6) the pickle followed by the bytes.
"""

import collections
import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from prunet.errors import UserError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of PyTorch before 1.6
LARGEST_PICKLE = 256 << 20  # bytes, without the tensors; Stable Diffusion's has about 1 MB
MOST_TUPLES = 60_000  # more, nested in each other, would overflow Python's stack; a tensor has three or four
LARGEST_GROWTH = 4  # output bytes per input byte; tied tensors are written once for each of their names
AGAIN = "fetch or copy it again"
IP_ADAPTER = {"image_proj", "ip_adapter"}  # the two mappings in such a file; safetensors joins their keys by dots

Places = Mapping[str, tuple[int, int]]  # start and length of each record in the file, in bytes


@dataclass(frozen=True)
class Storage:
    """The place of the numbers of one or more tensors: `numel` numbers of the record `key`, from number `start` on."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int


@dataclass(frozen=True)
class Note:
    """A tensor that is not read yet."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.size) * self.dtype.itemsize


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a checkpoint, contiguous, without shared memory, and the names of everything else."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path}: cannot be read (not a file): give the path of a checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            raise UserError(f"{path}: is already safetensors, not a pickle: rename it to {path.stem}.safetensors")
        value, places = _read_zip(path) if head.startswith(b"PK\x03\x04") else _read_legacy(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: cut off or damaged ({error}): {AGAIN}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give the path of a checkpoint") from error
    except UserError:
        raise
    except Exception as error:  # a pickle can fail in any way; none of its code has run
        raise UserError(
            f"{path}: not a checkpoint that PyTorch wrote ({str(error) or type(error).__name__}): {AGAIN}"
        ) from error
    notes, dropped = _notes(path, value)
    if sum(note.nbytes for note in notes.values()) > LARGEST_GROWTH * path.stat().st_size:
        raise UserError(f"{path}: its tensors would take over {LARGEST_GROWTH} times the file: it is not a checkpoint")
    file_bytes = np.memmap(path, np.uint8, "r")
    return {name: _tensor(path, name, note, file_bytes, places) for name, note in notes.items()}, dropped


def _notes(path: Path, value: Any) -> tuple[dict[str, Note], list[str]]:
    """Returns the tensors of a checkpoint by name, and the names of everything else in it."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains {_label(value)}, not tensors by name: save only its state_dict")
    if set(value) == IP_ADAPTER and all(isinstance(entry, dict) for entry in value.values()):
        value = {f"{part}.{_label(name)}": entry for part, state in value.items() for name, entry in state.items()}
    inside = [key for key, entry in value.items() if isinstance(entry, dict) and _holds_tensors(entry)]
    state, outside = value, []
    if "state_dict" in inside or not _holds_tensors(value):
        chosen = ["state_dict"] if "state_dict" in inside else inside
        if len(chosen) != 1:
            names = ", ".join(_label(key) for key in value)[:200] or "nothing"
            raise UserError(f"{path}: no state_dict in it, but {names}: save only the state_dict")
        state, outside = value[chosen[0]], [_label(key) for key in value if key != chosen[0]]
    elif inside:
        raise UserError(
            f"{path}: contains tensors, and more of them in {_label(inside[0])}: save the state_dict of only one model"
        )
    for name, entry in state.items():
        if _is_other_tensor(entry):
            raise UserError(f"{path}: {_label(name)} is a tensor of another kind ({entry.of}): save it as a dense one")
    notes = {name: entry for name, entry in state.items() if isinstance(name, str) and isinstance(entry, Note)}
    if odd := next((name for name in notes if name == "__metadata__" or not _is_text(name)), None):
        raise UserError(f"{path}: safetensors cannot store a tensor called {odd!r}: save it under another name")
    if unsaved := [name for name, note in notes.items() if note.dtype.is_complex]:
        raise UserError(f"{path}: {unsaved[0]} has complex numbers, which no part of a Stable Diffusion has")
    return notes, sorted([*outside, *(_label(name) for name in state if name not in notes)])


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(entry, Note) or _is_other_tensor(entry) for entry in state.values())


def _is_text(name: str) -> bool:
    return not re.search("[\ud800-\udfff]", name)


def _is_other_tensor(entry: Any) -> bool:
    """Returns whether torch would make a tensor that no stand-in here supports: sparse, negated, without a device."""
    return isinstance(entry, Inert) and entry.of.startswith(("torch._utils.", "torch.storage."))


def _label(value: Any) -> str:
    """Returns a string unchanged, and the type of anything else."""
    if isinstance(value, str):
        return value
    return getattr(value, "of", "") or type(value).__name__


def _tensor(path: Path, name: str, note: Note, file: Any, places: Places) -> Tensor:
    """Reads a tensor. The pickle says where it is, so its place is first checked against the file."""
    if 0 in note.size:
        return torch.empty(note.size, dtype=note.dtype)
    begin, length = places.get(note.storage.key, (0, 0))
    skipped, itemsize = note.storage.start * note.storage.dtype.itemsize, note.dtype.itemsize
    end = skipped + note.storage.numel * note.storage.dtype.itemsize
    first = skipped + note.offset * itemsize
    last = first + itemsize * sum((n - 1) * step for n, step in zip(note.size, note.stride, strict=True))
    if end > length or last + itemsize > end:
        raise UserError(f"{path}: {name} would be outside its record: {AGAIN}")
    numbers = torch.from_numpy(np.array(file[begin + first : begin + last + itemsize]))
    return numbers.view(note.dtype).as_strided(note.size, note.stride).contiguous()


# -- PyTorch's two layouts


def _read_zip(path: Path) -> tuple[Any, Places]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
            raise UserError(f"{path}: a zip, but not a checkpoint (it has no data.pkl, or a TorchScript program)")
        packed = any(info.compress_type != zipfile.ZIP_STORED for info in members.values())
        if packed or sum(info.file_size for info in members.values()) > path.stat().st_size:
            raise UserError(f"{path}: its records are compressed, which PyTorch never does: {AGAIN}")
        if f"{roots[0]}byteorder" in members:
            _check_byte_order(path, archive.read(f"{roots[0]}byteorder") == b"little")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        places = {}
        for name, info in members.items():
            if name.startswith(f"{roots[0]}data/"):
                file.seek(info.header_offset + 26)  # the lengths of the name and of the extra field
                places[name.removeprefix(f"{roots[0]}data/")] = (
                    info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))),
                    info.file_size,
                )
        return _unpickler(path, io.BytesIO(archive.read(f"{roots[0]}data.pkl"))).load(), places


def _read_legacy(path: Path) -> tuple[Any, Places]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if _unpickler(path, file).load() != LEGACY_MAGIC:
            raise UserError(f"{path}: a pickle, but not one of PyTorch's: only those hold checkpoints")
        _unpickler(path, file).load()  # the version of the layout
        _check_byte_order(path, _unpickler(path, file).load()["little_endian"])
        reader = _unpickler(path, file)
        value, places = reader.load(), {}
        for key in _unpickler(path, file).load():
            head = file.read(8)
            start, length = file.tell(), int.from_bytes(head, "little", signed=True) * reader.itemsizes[str(key)]
            if len(head) < 8 or length < 0 or start + length > size:
                raise EOFError(f"it ends within its tensors, after {size} bytes")
            places[str(key)] = (start, length)
            file.seek(start + length)
        return value, places


def _check_byte_order(path: Path, little_endian: bool) -> None:
    if not little_endian:
        raise UserError(f"{path}: written on a big-endian machine: save it again on a little-endian one")


# -- the pickle, in which nothing runs


def _unpickler(path: Path, file: Any) -> "_Unpickler":
    """Returns the unpickler for the pickle at the position of `file`.

    First checks the whole pickle, because numbers in it can demand any amount of memory.
    """
    begin, tuples = file.tell(), 0
    for opcode, argument, position in pickletools.genops(file):
        done, tuples = position - begin, tuples + opcode.name.startswith("TUPLE")
        memo = "PUT" in opcode.name and int(argument or 0) > done + 1
        if done > LARGEST_PICKLE or tuples > MOST_TUPLES or memo:
            raise UserError(f"{path}: a pickle that demands too much memory: it is not a checkpoint")
        if opcode.name.startswith("EXT"):  # a number instead of a name, which Python would look up in a registry
            raise UserError(f"{path}: a pickle with numbers for names ({opcode.name}): it is not a checkpoint")
    file.seek(begin)
    return _Unpickler(file)


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, with a stand-in for every name and a note for every storage."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="latin1")  # this encoding reads any string of Python 2
        self.itemsizes: dict[str, int] = {}  # bytes per number of each record

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        known = vars(torch).get(name) if module in ("torch", "torch.cuda") else None  # without an import
        if isinstance(known, torch.dtype):
            return known
        if module in ("torch", "torch.cuda") and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        return type("Inert", (Inert,), {"of": f"{module}.{name}"})

    @override
    def persistent_load(self, pid: Any) -> Any:
        if len(pid) < 5 or pid[0] != "storage":
            return Inert
        dtype, key, numel, view = pid[1], str(pid[2]), pid[4], pid[5] if len(pid) > 5 else None
        _, start, numel = view or (None, 0, numel)
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"numbers of the kind {_label(dtype)}")
        self.itemsizes.setdefault(key, dtype.itemsize)
        _check_counts(start, numel)
        return Storage(key, dtype, numel, start)


def _check_counts(*values: Any) -> None:
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise pickle.UnpicklingError("a tensor with a size that is not a number")


class Inert:
    """Stands for a class, a function or an object: accepts everything and does nothing."""

    of = ""

    @override
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns itself."""
        return self

    def _ignore(self, *args: Any) -> None: ...

    # The methods that a pickle calls on lists, mappings, sets and objects with a state.
    append = extend = add = __setitem__ = __setstate__ = _ignore


class _Tensor(Inert):
    """Stands for the functions that make a tensor of a storage; those of later versions also give a dtype."""

    def __new__(cls, storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
        if not isinstance(storage, Storage) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor without a storage")
        if bits := [name for value in rest if type(value) is dict for name in value if value[name]]:
            # The stored numbers are not the tensor's: it is negated or conjugated.
            return type("Inert", (Inert,), {"of": f"torch._utils.{_label(bits[0])}"})()
        dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
        _check_counts(offset, *size, *stride)
        return Note(storage, dtype, offset, tuple(size), tuple(stride))


class _Parameter(Inert):
    """Stands for the functions that make a parameter; returns only the tensor."""

    def __new__(cls, tensor: Any, *rest: Any) -> Any:
        return tensor


class _Subclass(Inert):
    """Stands for the function that makes a tensor of a subclass; returns only the tensor."""

    def __new__(cls, make: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
        return make(*arguments) if make in STAND_INS.values() else Inert()


STORAGES = {  # torch.FloatStorage and so on only name dtypes in a pickle
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _Subclass,
    ("torch.storage", "UntypedStorage"): torch.uint8,
}
