"""LPIPS against its definition, computed here from the weights; and in a run's evaluation and report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_run import CPU, recipe_file

from prunet import load_recipe, run
from prunet.disk.files import read_json
from prunet.intervals import mean_of

EVAL = Path(sys.prefix) / "eval"  # torch-fidelity and torchvision, which `make setup` keeps apart
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not EVAL.is_dir(), reason="torch-fidelity is not set up: make setup"),
]

#: VGG16 (arXiv 1409.1556, column D): the widths of its convolutions, by their number among torchvision's layers; and
#: the last of each block, after which LPIPS looks.
WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
LAST = (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in files of the published formats."""
    folder, rng, vgg, width = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0), {}, 3
    for i, wider in WIDTHS.items():
        vgg[f"features.{i}.weight"] = torch.randn(wider, width, 3, 3, generator=rng) * (2 / (9 * width)) ** 0.5
        vgg[f"features.{i}.bias"] = 0.1 * torch.randn(wider, generator=rng)
        width = wider
    linear = {f"lin{i}.model.1.weight": torch.rand(1, WIDTHS[n], 1, 1, generator=rng) for i, n in enumerate(LAST)}
    torch.save({**vgg, "classifier.0.bias": torch.zeros(3)}, folder / "vgg.pth")
    save_file(linear, folder / "lpips.safetensors")
    return {"vgg": folder / "vgg.pth", "lpips": folder / "lpips.safetensors"}


def by_hand(weights: dict[str, Path], a: Image.Image, b: Image.Image) -> float:
    """Equation 1 of arXiv 1801.03924: features of unit length over channels, their squared difference weighed by
    channel, the mean over space, the sum over layers.
    """
    from safetensors.torch import load_file

    vgg, linear = torch.load(weights["vgg"], weights_only=True), load_file(weights["lpips"])
    layers = []
    for picture in (a, b):
        x = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float64)).permute(2, 0, 1)[None]
        # As ImageNet's pictures are normalised, in the rounded numbers of the reference implementation.
        mean, std = (
            torch.tensor(v).double().view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        x, found = (x / 127.5 - 1 - mean) / std, []
        for i in WIDTHS:
            x = F.max_pool2d(x, 2) if i - 3 in LAST else x
            x = F.relu(F.conv2d(x, vgg[f"features.{i}.weight"].double(), vgg[f"features.{i}.bias"].double(), padding=1))
            if i in LAST:
                found.append(x / x.norm(dim=1, keepdim=True))
        layers.append(found)
    apart = [(one - other).square()[0] for one, other in zip(*layers, strict=True)]
    weighed = [linear[f"lin{i}.model.1.weight"].double()[0] * d for i, d in enumerate(apart)]
    return sum(d.sum(dim=0).mean().item() for d in weighed)


def python(*args: object) -> subprocess.CompletedProcess:
    """Runs it in a new process that can import torchvision."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(EVAL), os.environ.get("PYTHONPATH", ""))),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *map(str, args)], env=env, capture_output=True, text=True)


SCRIPT = """
import json, sys
from pathlib import Path
from prunet.torchvision_ops import declare_torchvision_ops
declare_torchvision_ops()
from PIL import Image
from prunet.errors import UserError
from prunet.evaluation.lpips import Lpips
folder, files, bad = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
lpips = Lpips.load({name: Path(path) for name, path in files.items()})
ours, theirs = ([Image.open(folder / f"{who}{i}.png") for i in range(3)] for who in "ab")
out = {"together": lpips(ours, theirs), "alone": [lpips([a], [b])[0] for a, b in zip(ours, theirs)]}
out |= {"turned": lpips(theirs, ours), "same": lpips(ours, ours), "said": []}
for name, path in bad:
    try:
        Lpips.load({**{n: Path(p) for n, p in files.items()}, name: Path(path)})
    except UserError as error:
        out["said"].append(str(error))
print(json.dumps(out))
"""


class Harm:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_equals_its_definition_and_refuses_other_files(weights: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a0", "a1", "a2", "b0", "b1", "b2"):
        blocks = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
        blocks.resize((40, 56), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    torch.save({"features.0.weight": Harm(tmp_path / "harm")}, tmp_path / "harmful.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    files = ("harmful.pth", "list.pth", "text.pth", "none.pth")
    bad = [(name, tmp_path / file) for name in ("vgg", "lpips") for file in files]
    bad += [("vgg", weights["lpips"]), ("lpips", weights["vgg"])]
    done = python("-c", SCRIPT, tmp_path, json.dumps(weights, default=str), json.dumps(bad, default=str))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    pictures = [[Image.open(tmp_path / f"{who}{i}.png") for i in range(3)] for who in "ab"]
    expected = [by_hand(weights, a, b) for a, b in zip(*pictures, strict=True)]
    assert min(expected) > 0.01
    for name in ("together", "alone", "turned"):
        assert found[name] == pytest.approx(expected, rel=1e-4), name
    assert found["same"] == [0, 0, 0]
    assert len(found["said"]) == len(bad)
    for (name, path), said in zip(bad, found["said"], strict=True):
        assert str(path) in said and "\n" not in said
        assert ("vgg16-397923af.pth" if name == "vgg" else "weights-vgg16-lpips.pth") in said
    assert not (tmp_path / "harm").exists()


def test_lpips_of_a_run_stands_beside_the_other_distances(sd, pictures, weights, tmp_path: Path) -> None:
    stage = {"steps": 1, "batch_size": 2, "warmup_steps": 0}
    recipe = recipe_file(tmp_path, sd, pictures, stages=[stage], sheet={"every": 0})
    folder = run(load_recipe(recipe), CPU)
    before = read_json(folder / "evaluation" / "evaluation.json")
    options = [f"--weights={name}={path}" for name, path in weights.items()]
    flags = ("--device", "cpu", "--precision", "no", "--json")
    done = python("-m", "prunet", "evaluate", folder, *options, *flags)
    assert done.returncode == 0, done.stderr
    after = read_json(folder / "evaluation" / "evaluation.json")
    drawn = folder / "evaluation" / "pictures"
    for name, distance in after["distance"].items():
        pairs = [[Image.open(drawn / who / f"{i:04d}.png") for who in (name, "teacher")] for i in range(2)]
        by_prompt = [by_hand(weights, *pair) for pair in pairs]
        assert distance.pop("lpips_by_prompt") == pytest.approx(by_prompt, rel=1e-4)
        expected = mean_of(by_prompt)
        assert distance.pop("lpips") == pytest.approx(expected.value, rel=1e-4)
        assert distance["intervals"].pop("lpips") == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert after.pop("lpips")
    assert after == before  # nothing else is measured again
    assert "| pictures, LPIPS (VGG16) |" in (folder / "evaluation" / "evaluation.md").read_text()
    assert "pictures, LPIPS" in (folder / "report.html").read_text()
