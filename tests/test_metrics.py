"""Metrics against their definitions, and against torch-fidelity's own command on the same pictures and weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunet.evaluation import metrics
from prunet.evaluation.metrics import Moments
from prunet.intervals import jackknife, mean_of

EVAL = Path(sys.prefix) / "eval"  # torch-fidelity and torchvision, which `make setup` keeps apart


def test_fid_of_gaussians_is_the_closed_form() -> None:
    # For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2.
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=(4, 12))
    a, b = Moments(m1, np.diag(s1**2), 0), Moments(m2, np.diag(s2**2), 0)
    expected = ((m1 - m2) ** 2).sum() + ((abs(s1) - abs(s2)) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    # Rotated together, they are as far apart.
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = (Moments(turn @ m.mean, turn @ m.covariance @ turn.T, 0) for m in (a, b))
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(2)
    same = [metrics.kernel_distance(*rng.normal(size=(2, 60, 4)), subset_size=60, subsets=1) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(200)
    a, b = rng.normal(size=(2, 60, 4))
    assert metrics.kid(a, b + 2, 60).low > max(same)
    # The sums of pairs are taken once; leaving pictures out gives what only the others would have given.
    found = metrics.kid(a, b, 60)
    slow = jackknife(found.value, 60, lambda kept: metrics.squared_mmd(a[kept], b))
    assert (found.low, found.high) == pytest.approx((slow.low, slow.high))


def test_precision_and_recall_of_half_a_manifold() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(200, 3)), rng.normal(size=(200, 3)) + 50
    both = np.concatenate([left, right])
    ours = rng.normal(size=(200, 3))
    assert metrics.covered(ours, both).mean() > 0.9  # what is drawn looks real
    assert 0.4 < metrics.covered(both, ours).mean() < 0.6  # half of the real ones is never drawn


def test_inception_score_of_sure_and_unsure_pictures() -> None:
    sure = 50.0 * np.eye(10)[np.arange(1000) % 10]
    assert metrics.inception_score(sure, splits=1) == pytest.approx(10)
    assert metrics.inception_score(np.zeros((1000, 10))) == pytest.approx(1)


def test_retrieval_counts_equal_prompts_as_one() -> None:
    texts = np.eye(4)[[0, 1, 2, 0]]
    assert metrics.retrieved(np.eye(4)[[0, 1, 1, 0]], texts).tolist() == [1, 1, 0, 1]
    rng = np.random.default_rng(0)  # also if they were computed in batches of different sizes, which round differently
    texts = np.tile(rng.normal(size=(20, 64)), (3, 1))
    rounded = (texts + 1e-6 * rng.normal(size=texts.shape)).astype(np.float32)
    assert metrics.retrieved(texts, rounded.astype(np.float64)).mean() == 1


def test_retrieval_among_other_prompts_finds_those_too() -> None:
    images, others = np.array([[1.0, 0.2], [0.2, 1.0]]), np.array([[1.0, 0.3], [1.0, 0.0]])
    assert metrics.retrieved(images, np.eye(2)).tolist() == [1, 1]
    assert metrics.retrieved(images, np.eye(2), others).tolist() == [0, 1]
    assert metrics.retrieved(images, np.eye(2), np.eye(2)).tolist() == [1, 1]


def test_intervals_cover_the_true_value() -> None:
    """Of 200 samples about 95 % have the true mean within their interval; likewise for the jackknife of a variance."""
    rng, hits, jack = np.random.default_rng(4), 0, 0
    for _ in range(200):
        values = rng.normal(3, 1, size=60)
        found = mean_of(values)
        hits += found.low <= 3 <= found.high
        found = jackknife(values.var(ddof=1), 60, lambda kept, v=values: float(v[kept].var(ddof=1)))
        jack += found.low <= 1 <= found.high
    assert 0.89 <= hits / 200 <= 0.99 and 0.86 <= jack / 200 <= 0.99


def test_moments_file_of_pytorch_fid(tmp_path: Path) -> None:
    whole = Moments.of(np.random.default_rng(5).normal(size=(30, 4)))
    np.savez(tmp_path / "real.npz", mu=whole.mean, sigma=whole.covariance)
    again = Moments.load(tmp_path / "real.npz")
    np.testing.assert_array_equal(again.covariance, whole.covariance)


SCRIPT = """
import json, sys
from pathlib import Path
from PIL import Image
import numpy as np, torch
from prunet.evaluation.networks import Inception
from prunet.evaluation import metrics
weights, ours, real = map(Path, sys.argv[1:4])
out = {}
for batch in (7, 24):
    net = Inception.load(weights)
    found = []
    for folder in (ours, real):
        pictures = [Image.open(p) for p in sorted(folder.glob("*.png"))]
        parts = [net(pictures[at : at + batch]) for at in range(0, len(pictures), batch)]
        found.append({k: torch.cat([p[k] for p in parts]).double().numpy() for k in parts[0]})
    a, b = found
    out[batch] = {
        "frechet_inception_distance": metrics.frechet_distance(*(metrics.Moments.of(f["pool"]) for f in found)),
        "kernel_inception_distance_mean": metrics.kernel_distance(a["pool"], b["pool"], 16),
        "inception_score_mean": metrics.inception_score(a["logits"]),
        "precision": metrics.covered(a["pool"], b["pool"]).mean(),
        "recall": metrics.covered(b["pool"], a["pool"]).mean(),
    }
net = Inception.load(weights, "pytorch-fid")
picture = Image.open(sorted(ours.glob("*.png"))[0])
seen = []
net.net.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
logits = net([picture])["logits"]
out["logits_apart"] = (logits - Inception.load(weights)([picture])["logits"]).abs().max().item()
x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
expected = 2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
out["pytorch_fid_input"] = (seen[-1] - expected).abs().max().item()
print(json.dumps(out))
"""
FIDELITY = "from prunet.evaluation.networks import torch_fidelity; torch_fidelity('fidelity').main()"


@pytest.mark.processes
@pytest.mark.skipif(not EVAL.is_dir(), reason="torch-fidelity is not set up: make setup")
def test_equals_torch_fidelitys_own_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    for name, low in (("ours", 0), ("real", 60)):
        (tmp_path / name).mkdir()
        for i in range(24):
            blocks = rng.integers(low, 256, size=(4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((48, 48), Image.Resampling.BICUBIC).save(tmp_path / name / f"{i:03d}.png")
    env = {**os.environ, "PYTHONPATH": str(EVAL), "OMP_NUM_THREADS": "1"}

    def python(*args: str) -> str:
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    python("-c", MAKE_WEIGHTS, str(weights))
    ours, real = str(tmp_path / "ours"), str(tmp_path / "real")
    found = json.loads(python("-c", SCRIPT, str(weights), ours, real).splitlines()[-1])
    options = ["--isc", "--fid", "--kid", "--prc", "--kid-subset-size", "16", "--json", "--cpu", "--silent"]
    options += ["--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights)]
    said = python("-c", FIDELITY, "--input1", ours, "--input2", real, *options)
    expected = json.loads(said[said.index("{") :])
    for batch in ("7", "24"):
        for name, value in found[batch].items():
            assert value == pytest.approx(expected[name], rel=1e-4), (batch, name)
    assert expected["frechet_inception_distance"] > 0 and expected["recall"] < 1
    assert found["pytorch_fid_input"] < 1e-5
    assert found["logits_apart"] == 0  # of the Inception score, which is torch-fidelity's whatever FID sees


MAKE_WEIGHTS = """
import sys, torch
from prunet.evaluation.networks import torch_fidelity
torch.manual_seed(0)
module = torch_fidelity("feature_extractor_inceptionv3")
try:
    module.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: setattr(module, "made", self) or 1 / 0
    module.load_state_dict_from_url = lambda *a, **k: {}
    module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
except ZeroDivisionError:
    pass
torch.save(module.made.state_dict(), sys.argv[1])
"""
