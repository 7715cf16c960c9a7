"""A protocol's metrics, computed from the features of pictures."""

import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from prunet.errors import UserError
from prunet.evaluation import metrics
from prunet.evaluation.metrics import Moments
from prunet.evaluation.protocol import NEED_REAL, SUBJECT, Protocol
from prunet.intervals import Array, Measure, mean_of


def compute(
    protocol: Protocol, found: Mapping[str, Mapping[str, Array]], theirs: Mapping[str, Any]
) -> dict[str, Measure]:
    """Returns the protocol's metrics from features by network; `theirs`: features of the real pictures.

    Raises:
        UserError: a metric is not finite, or the features do not fit each other.
    """
    out, key = {}, "pool" if protocol.features == "inception" else "image"
    real: Any = theirs.get(protocol.features)
    ours = _points(protocol, found[protocol.features][key]) if NEED_REAL & set(protocol.metrics) else np.zeros((0, 0))
    if isinstance(real, np.ndarray) and len(ours):
        real = _points(protocol, real)
        if real.shape[1] != ours.shape[1]:
            raise UserError(f"--real: features of {real.shape[1]} numbers, where the network gives {ours.shape[1]}")
    for name in protocol.metrics:
        if name == "fid":
            out[name] = metrics.fid(ours, real if isinstance(real, Moments) else Moments.of(real))
        elif name == "kid":
            out[name] = metrics.kid(ours, real, protocol.kid_subset_size)
        elif name in ("precision", "recall"):
            out[name] = mean_of(metrics.covered(*((ours, real) if name == "precision" else (real, ours))))
        elif name == "is":
            out[name] = metrics.inception(found["inception"]["logits"])
        elif name in SUBJECT:
            net = SUBJECT[name]
            out[name] = mean_of(metrics.likeness(found[net]["image"], theirs[net]))
        else:
            per_picture = metrics.cosines if name == "clip_score" else metrics.retrieved
            out[name] = mean_of(per_picture(found["clip"]["image"], found["clip"]["text"]))
    if broken := [name for name, value in out.items() if not all(map(math.isfinite, astuple(value)))]:
        raise UserError(f"{broken[0]} is not a number: draw more pictures, or delete features/ if it is damaged")
    return out


def _points(protocol: Protocol, features: Array) -> Array:
    """Scales CLIP's embeddings to length sqrt(D), since only direction counts; KID's kernel is then (cosine + 1)^3."""
    if protocol.features == "inception":
        return features
    points: Array = features / np.linalg.norm(features, axis=1, keepdims=True) * np.sqrt(features.shape[1])
    return points
