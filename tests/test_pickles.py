"""Pickled checkpoints: their tensors come out, and nothing that is in them runs."""

import builtins
import collections
import io
import os
import pickle
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prunet import UserError
from prunet.cli import main
from prunet.teacher.conversion import convert
from prunet.teacher.ldm import to_ldm
from prunet.teacher.teacher import Teacher

RAN = "PRUNET_TEST_RAN"
CODE = f"__import__('os').environ.__setitem__({RAN!r}, '1')"
LAYOUTS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Calls:
    """Pickled, it calls a function with arguments."""

    def __init__(self, function, *arguments) -> None:
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class WithState:
    """Pickled, it has a state that is set on what it is made of."""

    def __init__(self, function, state) -> None:
        self.reduced = function, (), state

    def __reduce__(self):
        return self.reduced


def save(value: object, path: Path, new: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def tensors() -> dict[str, Tensor]:
    """Of many dtypes and shapes; tied, transposed, cut out of another, with gradients."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    kinds = torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn
    return {
        "weight": weight,
        "tied": weight,
        "transposed": weight.T,
        "cut": weight[2:4, 1:3],
        "parameter": nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        **{str(kind): torch.randn(5).to(kind) for kind in kinds},
    }


@LAYOUTS
@pytest.mark.parametrize("inside", [True, False], ids=["state_dict", "flat"])
def test_tensors_come_out_as_they_are(tmp_path, new, inside) -> None:
    given = tensors()
    path = save({"state_dict": given, "epoch": 3} if inside else given, tmp_path / "a.ckpt", new)
    facts = convert(path)
    assert facts["dropped"] == (["epoch"] if inside else [])
    assert facts["tensors"] == len(given)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.detach().double()), name


@pytest.fixture
def lightning(monkeypatch) -> types.ModuleType:
    """A module whose classes are pickled by name, and that is not there any more when the file is read."""
    module = types.ModuleType("lightning_of_a_test")
    for name, base in (("ModelCheckpoint", object), ("Settings", dict), ("History", list)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__, "__qualname__": name}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@LAYOUTS
def test_an_original_checkpoint_with_all_that_trainers_leave_in_it(tmp_path, new, lightning, monkeypatch) -> None:
    settings = lightning.Settings(rate=np.float64(0.1), names=["a"])
    settings.extra = {"more": 1}
    state = {"a.weight": torch.ones(2, 2), "logit": np.float32(3), "step": 7, "history": lightning.History([1])}
    other = {
        "callbacks": {lightning.ModelCheckpoint: {"best": np.float64(0.5), "at": torch.tensor(1)}},
        "hyper_parameters": settings,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(9)}}}],
        "random": np.random.RandomState(0).get_state(),
        "device": torch.device("cpu"),
    }
    path = save({"state_dict": collections.OrderedDict(state), **other}, tmp_path / "model.ckpt", new)
    monkeypatch.delitem(sys.modules, lightning.__name__)
    facts = convert(path, tmp_path / "out.safetensors")
    assert facts["dropped"] == sorted([*other, "logit", "step", "history"])
    assert load_file(tmp_path / "out.safetensors").keys() == {"a.weight"}


def evil() -> dict[str, object]:
    inner = pickle.dumps(Calls(eval, CODE))
    checkpoint = io.BytesIO()
    torch.save({"a": Calls(eval, CODE)}, checkpoint)
    return {
        "a command": Calls(os.system, f"touch {RAN}"),
        "a command by another name": Calls(getattr, Calls(__import__, "os"), "system"),
        "eval": Calls(eval, CODE),
        "exec": Calls(exec, CODE),
        "a pickle in a pickle": Calls(pickle.loads, inner),
        "a checkpoint in a checkpoint": Calls(torch.load, io.BytesIO(checkpoint.getvalue())),
        "bytes of a storage": Calls(torch.storage._load_from_bytes, checkpoint.getvalue()),
        "an import": Calls(__import__, "this"),
        "a state": WithState(collections.OrderedDict, {"__class__": Calls(eval, CODE)}),
        "arguments": Calls(collections.OrderedDict, [["a", Calls(eval, CODE)]]),
        "a tensor's arguments": Calls(torch._utils._rebuild_tensor_v2, Calls(eval, CODE), 0, (1,), (1,), False, {}),
        "a subclass": Calls(torch._tensor._rebuild_from_type_v2, eval, Tensor, (CODE,), {}),
    }


@LAYOUTS
@pytest.mark.parametrize("name", evil())
def test_nothing_in_a_pickle_runs(tmp_path, new, name, monkeypatch) -> None:
    """As an entry beside tensors, inside an entry, and as the whole file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RAN, raising=False)
    good, bad = {"a": torch.ones(2)}, evil()[name]
    for where, value in {
        "beside": {"state_dict": good, "other": bad},
        "among": {**good, "other": bad},
        "below": {"state_dict": {**good, "other": [{"deep": bad}]}},
        "whole": bad,
    }.items():
        path, out = tmp_path / f"{where}.ckpt", tmp_path / f"{where}.safetensors"
        save(value, path, new)
        try:
            convert(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert where != "whole"
            assert torch.equal(load_file(out)["a"], good["a"])
        assert RAN not in os.environ and not Path(RAN).exists(), where
        assert where != "beside" or name in ("a tensor's arguments",) or out.exists()


def test_the_attacks_are_real(tmp_path, monkeypatch) -> None:
    """The test above proves something only if the same pickles run code elsewhere."""
    monkeypatch.setenv(RAN, "0")
    for name in ("eval", "exec", "a pickle in a pickle"):
        os.environ[RAN] = "0"
        pickle.loads(pickle.dumps(evil()[name]))
        assert os.environ[RAN] == "1", name


def test_code_in_the_first_pickle_of_a_legacy_file_does_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(RAN, raising=False)
    for first in (Calls(eval, CODE), {"a": Calls(eval, CODE)}, 1, [[[]]]):
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(first))
        with pytest.raises(UserError, match="but not one of PyTorch's"):
            convert(tmp_path / "a.ckpt")
        assert RAN not in os.environ


def test_nothing_is_imported(tmp_path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"canything.not.imported\nname\n(tR.")
    module = "cthis\ns\n."
    with pytest.raises(UserError):
        convert(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes(module.encode())
    with pytest.raises(UserError):
        convert(tmp_path / "a.ckpt")
    assert "this" not in sys.modules


def _zip(path: Path, members: dict[str, bytes], packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def wrong(folder: Path) -> dict[str, tuple[Path, str]]:
    good, old = save(tensors(), folder / "good.ckpt"), save(tensors(), folder / "old.ckpt", False)
    content, old_content = good.read_bytes(), old.read_bytes()
    at = content.index(struct.pack("<f", float(tensors()["weight"][0, 0])))

    os.mkfifo(pipe := folder / "pipe.ckpt")

    def file(name: str, data: bytes) -> Path:
        path = folder / f"{name}.ckpt"
        path.write_bytes(data)
        return path

    script = folder / "script.ckpt"
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(script)
    tied = dict.fromkeys(map(str, range(50)), torch.ones(100_000))
    expanded = {"a": torch.ones(1).expand(1 << 40)}
    outside = Calls(
        torch._utils._rebuild_tensor_v2,
        torch.storage.TypedStorage(2, dtype=torch.float32, _internal=True),
        1 << 30,
        (2,),
        (1,),
        False,
        {},
    )
    return {
        "nothing there": (folder / "none.ckpt", "cannot be read"),
        "a folder": (folder, "cannot be read"),
        "empty": (file("empty", b""), "not a checkpoint"),
        "text": (file("text", b"version https://git-lfs.github.com/spec/v1\n"), "not a checkpoint"),
        "cut zip": (file("cut", content[: len(content) // 2]), "cut off or damaged"),
        "cut legacy": (file("cut-old", old_content[:-20]), "cut off or damaged"),
        "a changed byte": (file("changed", content[:at] + b"\0\0\0\x01" + content[at + 4 :]), "checksum"),
        "safetensors": (file("safe", b"\x02\0\0\0\0\0\0\0{}"), "already safetensors"),
        "another zip": (_zip(folder / "zip.ckpt", {"a/b.txt": b"x"}), "not a checkpoint"),
        "bomb": (_zip(folder / "bomb.ckpt", {"a/data.pkl": bytes(1 << 24)}, packed=True), "compressed"),
        "TorchScript": (script, "TorchScript"),
        "no mapping": (save([torch.ones(1)], folder / "list.ckpt"), "contains list"),
        "a whole module": (save(nn.Linear(2, 2), folder / "module.ckpt"), "contains torch.nn"),
        "nothing in it": (save({}, folder / "nothing.ckpt"), "nothing"),
        "no tensors": (save({"state_dict": {"a": 1}}, folder / "numbers.ckpt"), "no state_dict in it, but"),
        "two of them": (
            save({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, folder / "2.ckpt"),
            "no state_dict",
        ),
        "sparse": (save({"a": torch.eye(3).to_sparse()}, folder / "sparse.ckpt"), "another kind"),
        "complex": (save({"a": torch.ones(2) * 1j}, folder / "complex.ckpt"), "complex"),
        "negated": (save({"a": torch.ones(2)._neg_view()}, folder / "negated.ckpt"), "another kind"),
        "conjugated": (save({"a": (torch.ones(2) * 1j).conj().imag}, folder / "conjugated.ckpt"), "another kind"),
        "metadata": (save({"__metadata__": torch.ones(1)}, folder / "metadata.ckpt"), "cannot store .* '__metadata__'"),
        "half a letter": (save({"a\ud800": torch.ones(1)}, folder / "letter.ckpt"), "cannot store"),
        "a pipe": (pipe, "not a file"),
        "tied too often": (save(tied, folder / "tied.ckpt"), "times the file"),
        "expanded": (save(expanded, folder / "expanded.ckpt"), "times the file"),
        "outside": (save({"a": outside}, folder / "outside.ckpt"), "outside its record"),
        "a memo of many": (file("memo", b"r" + struct.pack("<I", 1 << 31) + b"."), "too much memory"),
        "deep": (file("deep", b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."), "too much memory"),
        "a name by number": (file("ext", b"\x82\x01."), "numbers for names"),
        "bytes that are not there": (file("bytes", b"\x8e" + struct.pack("<q", 1 << 50) + b"."), "not a checkpoint"),
    }


def test_a_file_that_is_no_checkpoint_is_one_line_and_writes_nothing(tmp_path) -> None:
    for name, (path, message) in wrong(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            convert(path, tmp_path / "out.safetensors")
        assert "\n" not in str(error.value) and str(path) in str(error.value), name
        assert not list(tmp_path.glob("*.safetensors*")), name


@LAYOUTS
def test_a_file_cut_anywhere_is_refused(tmp_path, new) -> None:
    content = save(tensors(), tmp_path / "whole.ckpt", new).read_bytes()
    for length in range(0, len(content), 41):
        (tmp_path / "cut.ckpt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut off|not a checkpoint"):
            convert(tmp_path / "cut.ckpt")
    for cut in range(1, 60, 3):
        (tmp_path / "cut.ckpt").write_bytes(content[:-cut])
        with pytest.raises(UserError, match="cut off"):
            convert(tmp_path / "cut.ckpt")


def test_an_existing_file_is_kept(tmp_path, monkeypatch) -> None:
    path = save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        convert(path)
    for name in ("a.ckpt", "model-v1.5"):
        with pytest.raises(UserError, match=r"NAME\.safetensors"):
            convert(path, tmp_path / name)
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists"):
        convert(path, tmp_path / "link.safetensors")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"a\.ckpt is a file, not a folder"):
        patch.setattr("prunet.teacher.conversion.read_tensors", None)  # which takes minutes
        convert(path, path / "new.safetensors")
    assert convert(path.rename(tmp_path / "model-v1.5"))["output"].endswith("/model-v1.5.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_a_pickled_teacher_opens_after_the_advised_conversion(sd, tmp_path, capsys, monkeypatch) -> None:
    teacher = Teacher(sd)
    state = to_ldm(teacher.unet, teacher.vae, teacher.text_part("text_encoder"))
    path = save({"state_dict": state, "global_step": 3}, tmp_path / "mine.ckpt")
    shutil.copytree(sd, tmp_path / "mine.config", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=f"`prunet convert {path}`"):
        Teacher(path)
    monkeypatch.setattr(sys, "argv", ["prunet", "convert", str(path)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert "left out: global_step" in capsys.readouterr().out
    again, given = Teacher(tmp_path / "mine.safetensors").unet.state_dict(), teacher.unet.state_dict()
    assert again.keys() == given.keys() and all(torch.equal(tensor, given[name]) for name, tensor in again.items())


def test_a_pickled_part_of_a_folder_opens_after_the_advised_conversion(sd, tmp_path) -> None:
    folder = shutil.copytree(sd, tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=f"`prunet convert {pickled} -o {weights}`"):
        Teacher(folder).check_weights()
    convert(pickled, weights)
    again, given = Teacher(folder).unet.state_dict(), Teacher(sd).unet.state_dict()
    assert again.keys() == given.keys() and all(torch.equal(tensor, given[name]) for name, tensor in again.items())


def test_builtins_are_whole() -> None:
    """The stand-ins are no longer in place of the real builtins."""
    assert eval is builtins.eval and eval("1 + 1") == 2
