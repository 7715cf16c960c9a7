"""A protocol of measuring: everything except the model that a number depends on.

Numbers by different protocols are not compared. prunet's protocols are the YAML files in
`prunet/evaluation/protocols/`; users can write their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from prunet.disk.reading import load_mapping
from prunet.errors import UserError
from prunet.recipe.prompts import prompts_hash, read_prompt_file
from prunet.recipe.recipe import explain
from prunet.recipe.values import Copies, Drawing, Integer, Part, Seed, Size, Steps

FOLDER = Path(__file__).parent / "protocols"
#: Metrics that compare with real pictures.
NEED_REAL = {"fid", "kid", "precision", "recall"}
#: The place of a subject in a prompt.
SUBJECT_MARK = "{subject}"
#: Metrics that compare with pictures of a subject, and the network for each.
SUBJECT = {"clip_i": "clip", "dino": "dino"}
#: Titles of metrics in tables, and the better direction.
TITLES = {
    "fid": ("FID", "lower"),
    "is": ("Inception score", "higher"),
    "kid": ("KID", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "clip_score": ("CLIP score", "higher"),
    "retrieval": ("R@1 among the prompts", "higher"),
    "clip_i": ("CLIP-I", "higher"),
    "dino": ("DINO", "higher"),
}


@dataclass(frozen=True)
class ProtocolFiles:
    """Files that a measurement by a protocol needs.

    `beside`: the folder of the protocol's own files. `real`: a folder of pictures, features that an earlier measurement
    saved, or pytorch-fid's .npz (FID only). `weights`: files of `inception`, `clip` and `dino`.
    """

    beside: Path | None = None
    real: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)


class Given(Part):
    """Prompts or pictures from the user, or from a `file` beside the protocol."""

    source: str = Field(description="where to get them, for messages")
    file: str | None = Field(default=None, description="beside the protocol's own file, if they come with it")
    count: Steps | None = Field(default=None, description="number of prompts or pictures")
    of: Steps | None = Field(default=None, description="number in the file; the first `count` are used")
    sha256: str | None = Field(default=None, description="hash of the prompts, one on each line, or of the statistics")


class Network(Part):
    """The model of `dino`."""

    model: str = Field(description="its name in the library, or a folder beside the protocol")
    source: str = Field(description="where to get its weights")
    file: str | None = Field(default=None, description="beside the protocol's own file, if they come with it")


class Clip(Network):
    """The model of `clip_score`, `retrieval` and `clip_i`."""

    library: Literal["transformers", "open_clip"] = Field(default="transformers", description="library for its weights")


class Protocol(Drawing):
    """A protocol: the prompts, how they are drawn, and what the pictures are compared with."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="name of the results")
    version: Steps = Field(default=1, description="goes up when numbers are no longer comparable")
    description: str = Field(default="", description="text for `prunet protocols`")
    prompts: Given = Field(description="the prompts")
    images_per_prompt: Copies | None = Field(default=None, description="pictures for each prompt; by default one")
    seed: Seed = Field(default=0, description="seed of the first picture; the next has the next one")
    size: Size | None = Field(default=None, description="pixels; if not given, the model's native size")
    precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="precision of the model")
    jpeg: Annotated[Integer, Field(ge=1, le=100)] | None = Field(
        default=None, description="JPEG quality of stored pictures, also after they are resized; null: PNG"
    )
    resize: Size | None = Field(default=None, description="side in pixels of measured pictures; null: not resized")
    resample: Literal["bicubic", "bilinear", "lanczos", "box"] = Field(
        default="bicubic", description="filter of `resize`"
    )
    metrics: Annotated[list[str], Field(min_length=1)] = Field(description=f"some of {', '.join(TITLES)}")
    features: Literal["inception", "clip"] = Field(
        default="inception",
        description="for fid, kid, precision and recall",
    )
    preprocessing: Literal["torch-fidelity", "pytorch-fid"] = Field(
        default="torch-fidelity",
        description="how pictures are resized for the Inception network: the two differ; for `is` torch-fidelity's",
    )
    kid_subset_size: Annotated[Integer, Field(ge=10)] = Field(default=1000, description="pictures in a subset of KID")
    clip: Clip | None = Field(default=None, description="the model that compares picture and prompt")
    dino: Network | None = Field(default=None, description="the model that compares pictures with those of a subject")
    real: Given | None = Field(default=None, description="real pictures, or their features, to compare with")
    note: str = Field(default="", description="differences from the published protocol that it follows")

    @model_validator(mode="after")
    def _whole(self) -> "Protocol":
        if unknown := [m for m in self.metrics if m not in TITLES]:
            raise ValueError(f"no metric {unknown[0]!r}: {', '.join(TITLES)}")
        if self.real is None and (wanting := [m for m in self.metrics if m in {*NEED_REAL, *SUBJECT}]):
            raise ValueError(f"{wanting[0]} compares with real pictures: give 'real'")
        if self.clip is None and ({"clip_score", "retrieval", "clip_i"} & set(self.metrics) or self.features == "clip"):
            raise ValueError("clip_score, retrieval, clip_i and features: clip need 'clip', a model")
        if self.dino is None and "dino" in self.metrics:
            raise ValueError("dino needs 'dino', a model")
        return self


def protocol_names() -> list[str]:
    """Returns the names of prunet's protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> tuple[Protocol, Path]:
    """Loads one of prunet's protocols by name, or a YAML file; also returns the folder of the protocol's files.

    Raises:
        UserError: there is no such protocol, or a value does not fit (the message names its key).
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"No protocol {str(name)!r}: choose {', '.join(protocol_names())}, or give a YAML file")
    try:
        return Protocol.model_validate(load_mapping(path, "a protocol")), path.parent
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Protocol)}") from error


def protocol_prompts(
    protocol: Protocol, folder: Path, given: Path | None, limit: int | None = None, subject: str | None = None
) -> list[str]:
    """Reads the prompts of a protocol, and checks their count and hash. `subject`: what they say in place of its mark.

    Raises:
        UserError: prompts are missing (the message says where to get them), or are the wrong ones, or lack a subject.
    """
    wanted = protocol.prompts
    path = given or (folder / wanted.file if wanted.file else None)
    if path is None:
        raise UserError(
            f"protocol {protocol.name}: its prompts do not come with prunet: give --prompts FILE. {wanted.source}"
        )
    prompts = read_prompt_file(path)
    length = wanted.of or wanted.count
    if length not in (None, len(prompts)):
        raise UserError(f"{path}: {len(prompts):,} prompts; protocol {protocol.name} needs {length:,}. {wanted.source}")
    prompts = prompts[: wanted.count]
    if wanted.sha256 is not None and prompts_hash(prompts) != wanted.sha256:
        raise UserError(f"{path}: not the prompts of protocol {protocol.name} (their hash differs). {wanted.source}")
    if len(prompts[:limit]) < 2:
        raise UserError(f"{path}: one prompt is too few: give at least two")
    filled = _with_subject(prompts[:limit], subject, path)
    return [prompt for prompt in filled for _ in range(protocol.images_per_prompt or 1)]


def _with_subject(prompts: list[str], subject: str | None, path: Path) -> list[str]:
    """Returns the prompts with the subject in place of its mark."""
    marked = any(SUBJECT_MARK in prompt for prompt in prompts)
    if marked and not (subject or "").strip():
        raise UserError(f"{path.name}: its prompts are about a subject: give --subject, such as --subject 'sks dog'")
    if subject is not None and not marked:
        raise UserError(f"--subject {subject}: the prompts of {path} have no {SUBJECT_MARK}: leave it out")
    return [prompt.replace(SUBJECT_MARK, subject or "") for prompt in prompts]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lists the keys in which two protocols of results differ; description and note do not count."""
    keys = sorted((a.keys() | b.keys()) - {"description", "note"})
    return [key for key in keys if a.get(key) != b.get(key)]
