"""Measures of sets of pictures from their features, each with a 95 % interval.

They agree with torch-fidelity's own command to 1e-4 (tests/test_metrics.py). FID needs only the mean and covariance of
features; the other measures need the features themselves.
"""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from prunet.errors import UserError
from prunet.intervals import Array, Measure, jackknife, parts_of

#: Seed of subsets and splits: that of torch-fidelity, so that both choose the same.
SEED = 2020


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` features (0: unknown)."""

    mean: Array
    covariance: Array
    count: int

    @classmethod
    def of(cls, features: Array) -> "Moments":
        """Computes the moments of features (N, D)."""
        features = features.astype(np.float64)
        return cls(features.mean(axis=0), np.cov(features, rowvar=False), len(features))

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Loads pytorch-fid's file, an .npz with `mu` and `sigma`.

        Raises:
            UserError: the file has another form.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise UserError(f"{path}: not an .npz with mu and sigma, as pytorch-fid writes it ({error})") from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: mu {mean.shape} and sigma {covariance.shape} do not belong together")
        return cls(mean, covariance, 0)


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (https://arxiv.org/abs/1706.08500)."""
    values, vectors = np.linalg.eigh(b.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # C1 C2 has the same eigenvalues as the symmetric C2^(1/2) C1 C2^(1/2), which are faster to compute and not
    # negative.
    cross = np.sqrt(np.linalg.eigvalsh(root @ a.covariance @ root).clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def inception_score(logits: Array, splits: int = 10) -> float:
    """exp of the mean KL divergence between p(y | x) and p(y), the mean over splits (https://arxiv.org/abs/1606.03498).

    `logits` (N, classes); shuffled and split as torch-fidelity does it.
    """
    logits = logits[np.random.RandomState(SEED).permutation(len(logits))].astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores))


def kernel_distance(a: Array, b: Array, subset_size: int = 1000, subsets: int = 100) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3, the mean over subsets (https://arxiv.org/abs/1801.01401).

    `a` and `b` (N, D); subsets are chosen as torch-fidelity chooses them.
    """
    rng, found = np.random.RandomState(SEED), []
    a, b = a.astype(np.float64), b.astype(np.float64)
    for _ in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)]
        y = b[rng.choice(len(b), subset_size, replace=False)]
        found.append(squared_mmd(x, y))
    return float(np.mean(found))


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased squared MMD over all pairs of `x` and `y` (N, D), with KID's kernel."""
    return _alike_within(x) + _alike_within(y) - 2 * float(_sums(x, y).mean()) / len(y)


def _sums(x: Array, y: Array, rows: int = 2000) -> Array:
    """Returns for each row of `x` the sum of KID's kernel over all rows of `y`; some rows at once are in memory."""
    return np.concatenate([((part @ y.T / x.shape[1] + 1) ** 3).sum(axis=1) for part in parts_of(x, rows)])


def _own(x: Array) -> Array:
    """Returns KID's kernel of each row of `x` with itself."""
    out: Array = ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3
    return out


def _alike_within(x: Array) -> float:
    """Returns the mean of KID's kernel over all pairs of two different rows of `x`."""
    return float(_sums(x, x).sum() - _own(x).sum()) / (len(x) * (len(x) - 1))


def covered(points: Array, manifold: Array, neighbours: int = 3, rows: int = 2000) -> Array:
    """Returns (N,) 1.0 for points as near to a point of `manifold` as its k-th nearest neighbour there, or nearer.

    The mean for drawn pictures among real ones is precision, and for real ones among drawn ones recall
    (https://arxiv.org/abs/1904.06991).
    """
    radii = np.concatenate(
        [
            np.partition(_distances(part, manifold), neighbours, axis=1)[:, neighbours]
            for part in parts_of(manifold, rows)
        ]
    )
    inside = [(_distances(part, manifold) <= radii).any(axis=1) for part in parts_of(points, rows)]
    return np.concatenate(inside).astype(np.float64)


def _distances(a: Array, b: Array) -> Array:
    import torch

    return torch.cdist(torch.from_numpy(a).float(), torch.from_numpy(b).float()).numpy().astype(np.float64)


def cosines(images: Array, texts: Array) -> Array:
    """Returns (N,) cosines of pictures and their prompts; CLIP score is the mean (https://arxiv.org/abs/2104.08718)."""
    out: Array = (_unit(images) * _unit(texts)).sum(axis=1)
    return out


def likeness(images: Array, subject: Array) -> Array:
    """Returns (N,) mean cosines of pictures with all of a subject (M, D): DINO, CLIP-I (arXiv 2208.12242)."""
    out: Array = (_unit(images) @ _unit(subject).T).mean(axis=1)
    return out


def retrieved(images: Array, texts: Array, others: Array | None = None) -> Array:
    """Returns (N,) 1.0 where the nearest of all prompts is the picture's own (equal prompts count as one).

    `others` (M, D): prompts of no picture, among which it is found too.
    """
    given = texts if others is None else np.concatenate([texts, others])
    near = _unit(images) @ _unit(given).T
    # The embeddings of equal prompts differ by rounding if they were computed in batches of different sizes.
    return np.asarray(near.diagonal() > near.max(axis=1) - 1e-6, dtype=np.float64)


def _unit(values: Array) -> Array:
    out: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return out


# -- intervals


def fid(ours: Array, real: Moments) -> Measure:
    """FID of features (N, D) against the real ones' moments."""
    value = frechet_distance(Moments.of(ours), real)
    return jackknife(value, len(ours), lambda kept: frechet_distance(Moments.of(ours[kept]), real))


def inception(logits: Array) -> Measure:
    """Inception score of `logits` (N, classes)."""
    return jackknife(inception_score(logits), len(logits), lambda kept: inception_score(logits[kept], splits=1))


def kid(ours: Array, real: Array, subset_size: int = 1000) -> Measure:
    """KID of features (N, D) against real ones; its interval is over all pairs, since random subsets would widen it."""
    value = kernel_distance(ours, real, subset_size)
    ours, real = ours.astype(np.float64), real.astype(np.float64)
    theirs, among, cross, own = _alike_within(real), _sums(ours, ours), _sums(ours, real), _own(ours)

    def of(kept: NDArray[np.int64]) -> float:
        gone = np.setdiff1d(np.arange(len(ours)), kept)  # few, so only their pairs are computed again
        pairs = among.sum() - 2 * among[gone].sum() + _sums(ours[gone], ours[gone]).sum() - own[kept].sum()
        return float(pairs / (len(kept) * (len(kept) - 1)) + theirs - 2 * cross[kept].mean() / len(real))

    return jackknife(value, len(ours), of)
