"""LPIPS, the perceptual distance of two pictures (https://arxiv.org/abs/1801.03924), by torch-fidelity's network.

A run's evaluation has pictures of teacher and students at equal prompts and seeds. LPIPS is computed from these if the
user has the weights of its network, and added to the evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from prunet.console import progress
from prunet.data.pictures import BrokenPicture, make_picture
from prunet.errors import UserError
from prunet.evaluation.networks import file_hash, instead, pixels_of, read_weights, torch_fidelity
from prunet.evaluation.results import EvaluationResult, read_evaluation
from prunet.intervals import mean_of

BATCH = 4
SOURCES = {
    "vgg": "vgg16-397923af.pth, torchvision's VGG16 trained on ImageNet",
    "lpips": (
        "weights-vgg16-lpips.pth of torch-fidelity's release v0.2.0 (weights/v0.1/vgg.pth of the package lpips has the "
        "same weights)"
    ),
}


@dataclass
class Lpips:
    """The network of LPIPS, called with two lists of pictures. `hash` identifies its weights."""

    net: nn.Module
    hash: str
    device: torch.device

    @classmethod
    def load(cls, weights: Mapping[str, Path], device: str | torch.device = "cpu") -> "Lpips":
        """Loads the network. `weights`: files of `vgg` and `lpips`, .pth (opened without unpickling) or .safetensors.

        Raises:
            UserError: torch-fidelity is not installed, or a file is missing or does not hold these weights.
        """
        if strange := weights.keys() - SOURCES.keys():
            raise UserError(f"--weights {min(strange)}=...: LPIPS needs vgg=FILE and lpips=FILE")
        for name, source in SOURCES.items():
            if name not in weights:
                raise UserError(f"LPIPS needs the weights of {name}, too: give --weights {name}=FILE. It is {source}")
        states = {name: read_weights(name, weights[name], source) for name, source in SOURCES.items()}
        module = torch_fidelity("sample_similarity_lpips")
        # torch-fidelity would download and unpickle both; instead it gets the weights that were read here.
        with (
            instead(module, "torchvision_load_pretrained_vgg16", lambda: _vgg(states["vgg"], weights["vgg"])),
            instead(module, "load_state_dict_from_url", lambda *args, **options: states["lpips"]),
        ):
            try:
                net = module.SampleSimilarityLPIPS("lpips-vgg16")
            except (RuntimeError, AttributeError, TypeError) as error:
                raise UserError(f"{weights['lpips']}: not the weights of LPIPS: take {SOURCES['lpips']}") from error
        made_of = " ".join(file_hash(weights[name]) for name in SOURCES)
        return cls(net.float().to(device), made_of, torch.device(device))

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
        """Returns the distance of each of `pictures` to the picture at the same place in `others`."""
        distances: Tensor = self.net(*(pixels_of(p).to(self.device) for p in (pictures, others)))
        return list(map(float, distances))


def _vgg(state: Any, path: Path) -> nn.Module:
    """Builds torchvision's VGG16 with the weights of its convolutions, because LPIPS uses only these."""
    from torchvision.models import vgg16

    try:
        with torch.device("meta"):  # saves the time of making random weights that are replaced
            net: Any = vgg16()
        convolutions = {name: value for name, value in state.items() if name.startswith("features.")}
        net.features.load_state_dict(
            {name.partition(".")[2]: value for name, value in convolutions.items()}, assign=True
        )
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not the weights of VGG16: take {SOURCES['vgg']}") from error
    module: nn.Module = net
    return module


def add_lpips(folder: Path | str, lpips: Lpips) -> EvaluationResult:
    """Adds LPIPS to the evaluation in `folder`, from its pictures.

    Raises:
        UserError: there is no whole evaluation, or a distance is not a number.
    """
    folder = Path(folder)
    result = read_evaluation(folder)
    count, distances = len(result.protocol.prompts), dict(result.distance)
    with progress("LPIPS", count * len(distances)) as bar:
        for name, distance in result.distance.items():
            by_prompt: list[float] = []
            for at in range(0, count, BATCH):
                files = [f"{i:04d}.png" for i in range(at, min(at + BATCH, count))]
                ours, theirs = ([_open(folder, f"{who}/{file}") for file in files] for who in (name, "teacher"))
                by_prompt += lpips(ours, theirs)
                bar.advance(len(files), note=name)
            found = mean_of(by_prompt)
            if not math.isfinite(found.value):
                raise UserError("LPIPS is not a number: are the weights those of " + " and of ".join(SOURCES) + "?")
            intervals = distance.intervals | {"lpips": (found.low, found.high)}
            added = {"intervals": intervals, "lpips": found.value, "lpips_by_prompt": by_prompt}
            distances[name] = distance.model_copy(update=added)
    result = result.model_copy(update={"distance": distances, "lpips": lpips.hash})
    result.write(folder)
    return result


def _open(folder: Path, name: str) -> Image.Image:
    path = folder / "pictures" / name
    try:
        return make_picture(path.name, ("",), "", path).open()
    except BrokenPicture as error:
        raise UserError(f"{path}: {error.why}: delete {folder} and evaluate again") from error
