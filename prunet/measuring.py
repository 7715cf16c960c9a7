"""A model measured by a protocol: prompts -> pictures -> features -> numbers with intervals.

The folder that comes of it::

    spec.json                  the protocol as it was used, and the model's fingerprint
    pictures/00000.tar ...     what was drawn, with prompts
    features/NET/00000...      features of each shard; real.safetensors: of the real pictures, to be given again
    measures.json  measures.md

All of it is resumable, and shared out among the processes of `accelerate launch`.
"""

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from prunet import metrics
from prunet.console import progress, say
from prunet.errors import UserError
from prunet.features import INCEPTION_SOURCE, Clip, Features, Inception, file_hash, prepared
from prunet.files import new_file, read_json, write_json, write_text
from prunet.generation import SHARD, draw_shards, read_shard
from prunet.latents import check_size
from prunet.metrics import Measure, Moments
from prunet.pictures import FORMATS, to_rgb
from prunet.pipeline import SAMPLERS, set_sampler
from prunet.protocol import NEED_REAL, Protocol, describe, differences, prompts_hash, title_rows
from prunet.sources import PICTURE_FILES
from prunet.teacher import Teacher

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure(
    model: str | Path,
    protocol: Protocol,
    prompts: Sequence[str],
    folder: Path | str,
    *,
    beside: Path | None = None,
    real: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    config: str | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
) -> dict[str, Any]:
    """Draws the prompts with the pipeline at `model` and measures the pictures; returns what `measures.json` holds.

    `beside`: the folder of the protocol's own files; `real`: a folder of pictures, features that an earlier measuring
    saved, or pytorch-fid's .npz (FID only); `weights`: files of `inception` and `clip`.

    Raises:
        UserError: something is missing or does not fit, before anything is drawn; the folder holds another measuring.
    """
    folder, state = Path(folder), PartialState(cpu=torch.device(device).type == "cpu")
    where = state.device if state.num_processes > 1 else torch.device(device)
    exported = Path(model) / "pipeline"
    teacher = Teacher(
        exported if exported.is_dir() else model, config=config, device=where, dtype=DTYPES[protocol.precision]
    )
    size = protocol.size or teacher.native_size
    check_size(teacher, size, "size")
    if protocol.sampler not in SAMPLERS:
        raise UserError(f"protocol {protocol.name}: no sampler {protocol.sampler!r}: {', '.join(SAMPLERS)}")
    teacher.check_weights()
    reference = _reference(protocol, real, beside)
    content = _content_hash(reference)
    networks = load_networks(protocol, dict(weights or {}), beside, where)
    if "kid" in protocol.metrics and len(prompts) < protocol.kid_subset_size:
        raise UserError(f"{len(prompts):,} prompts are too few for KID with subsets of {protocol.kid_subset_size:,}")

    # What lies where does not matter, what it holds does.
    left_out = {"prompts": {"file", "source"}, "real": {"file", "source"}, "clip": {"file", "source"}}
    used = protocol.model_dump(mode="json", exclude=left_out)
    used |= {"size": size, "count": len(prompts), "prompts_sha256": prompts_hash(list(prompts))}
    used |= {"networks": {name: net.hash for name, net in networks.items()}, "real_sha256": content}
    spec = {"protocol": used, "model": teacher.fingerprint()}
    if (folder / "spec.json").is_file() and read_json(folder / "spec.json") != spec:
        raise UserError(f"{folder}: holds a measuring of another model or by another protocol: give another --output")
    if state.is_main_process:
        _check_disk(folder, len(prompts), size, protocol.jpeg)
        write_json(folder / "spec.json", spec)
    state.wait_for_everyone()

    share = {"rank": state.process_index, "ranks": state.num_processes}
    how = {"steps": protocol.steps, "guidance_scale": protocol.guidance_scale, "seed": protocol.seed}
    shards = draw_shards(
        _Lazy(lambda: set_sampler(teacher.pipeline(), protocol.sampler)),
        prompts,
        folder / "pictures",
        size=size,
        jpeg=protocol.jpeg,
        batch_size=batch_size,
        **share,  # type: ignore[arg-type]
        **how,  # type: ignore[arg-type]
    )
    teacher.release("unet", "vae", "text")
    for name, net in networks.items():
        _extract(shards, net, protocol, folder / "features" / name, **share)
        if reference is not None and reference.is_dir() and name == protocol.features:
            _extract(_chunks(reference), net, protocol, folder / "features" / f"{name}-real", **share)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}

    found = {name: _together(folder / "features" / name) for name in networks}
    theirs = _real_features(reference, folder, networks, protocol)
    measures = {name: asdict(value) for name, value in measured(protocol, found, theirs).items()}
    result = {
        "model": {"source": Path(str(model)).name, "fingerprint": spec["model"]},
        "protocol": used,
        "measures": measures,
        "versions": {name: importlib.metadata.version(name) for name in ("prunet", "torch", "diffusers")},
    }
    write_text(folder / "measures.md", markdown([result]))
    write_json(folder / "measures.json", result)
    return result


def _check_disk(folder: Path, count: int, size: int, jpeg: int | None) -> None:
    """Photographs take about 0.6 of their pixels as PNG, and a tenth of them as JPEG."""
    drawn = sum(path.stat().st_size for path in folder.glob("pictures/*.tar"))
    need = count * size * size * 3 * (0.1 if jpeg else 0.6) - drawn
    where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    if shutil.disk_usage(where).free < need:
        raise UserError(f"--output {folder}: {count:,} pictures need about {need / 1e9:.1f} GB: give another disk")


class _Lazy:
    """A pipeline that is loaded when the first shard is drawn, so that a finished set costs nothing."""

    def __init__(self, make: Any) -> None:
        self._make, self._made = make, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole()(*args, **kwargs)

    def _whole(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made


def load_networks(
    protocol: Protocol, weights: dict[str, Path], beside: Path | None, device: torch.device | str
) -> dict[str, Any]:
    """The networks that the protocol's metrics need, by name.

    Raises:
        UserError: weights that are missing, unknown or of another network.
    """
    wanted = set(protocol.metrics)
    needed = {protocol.features} if wanted & NEED_REAL else set()
    needed |= {"inception"} if "is" in wanted else set()
    needed |= {"clip"} if wanted & {"clip_score", "retrieval"} else set()
    if strange := set(weights) - {"inception", "clip"}:
        raise UserError(f"--weights {strange.pop()}=...: give inception=FILE or clip=FILE")
    if "clip" in needed and protocol.clip and protocol.clip.file and beside:
        weights.setdefault("clip", beside / protocol.clip.file)
    for name in sorted(needed - weights.keys()):
        where = INCEPTION_SOURCE if name == "inception" else protocol.clip.source if protocol.clip else ""
        raise UserError(f"protocol {protocol.name} needs the weights of {name}: give --weights {name}=PATH. {where}")
    networks: dict[str, Any] = {}
    if "inception" in needed:
        networks["inception"] = Inception.load(weights["inception"], protocol.preprocessing, device)
    if "clip" in needed and protocol.clip:
        if protocol.clip.library == "open_clip":
            networks["clip"] = Clip.load_open_clip(protocol.clip.model, weights["clip"], device)
        else:
            networks["clip"] = Clip.load(weights["clip"], device)
    return networks


# -- features, one file a shard


def _extract(
    shards: Sequence[Any], net: Any, protocol: Protocol, folder: Path, *, rank: int = 0, ranks: int = 1
) -> None:
    """Features of each shard (a tar of ours, or a list of picture files) into a file of its own."""
    mine = [(i, shard) for i, shard in enumerate(shards) if i % ranks == rank]
    with progress(f"Features: {folder.name}", len(mine)) as bar:
        for i, shard in mine:
            path = folder / f"{i:05d}.safetensors"
            if not path.is_file():
                drawn = isinstance(shard, Path)
                samples = list(read_shard(shard) if drawn else map(_open, shard))
                parts: list[Features] = []
                for at in range(0, len(samples), 50):
                    pictures, texts = zip(*samples[at : at + 50], strict=True)
                    how = (protocol.resize, protocol.resample, protocol.jpeg)
                    parts.append(net([prepared(p, *how) for p in pictures], list(texts) if drawn else None))
                whole = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                with new_file(path) as part_file:
                    save_file(whole, part_file)
            bar.advance()


def _open(path: Path) -> tuple[Image.Image, str]:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            return to_rgb(picture), ""
    except OSError as error:
        raise UserError(f"{path}: not readable as a picture ({error}): take it away or mend it") from error


def _chunks(folder: Path) -> list[list[Path]]:
    """The pictures in a folder, a shard's worth at a time."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_FILES)
    return [files[at : at + SHARD] for at in range(0, len(files), SHARD)]


def _together(folder: Path) -> dict[str, metrics.Array]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}


def _reference(protocol: Protocol, real: Path | None, beside: Path | None) -> Path | None:
    """Where the real pictures, their features or their moments are.

    Raises:
        UserError: the protocol needs some and there are none.
    """
    if protocol.real is None or not NEED_REAL & set(protocol.metrics):
        return None
    path = real or (beside / protocol.real.file if beside and protocol.real.file else None)
    if path is None:
        raise UserError(
            f"protocol {protocol.name} compares with real pictures: give --real PATH. {protocol.real.source}"
        )
    if path.is_dir():
        count = sum(map(len, _chunks(path)))
        if not count:
            raise UserError(f"--real {path}: no picture in it")
        if protocol.real.count not in (None, count):
            raise UserError(f"--real {path}: {count:,} pictures, not {protocol.real.count:,}. {protocol.real.source}")
    elif not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"--real {path}: give a folder of pictures, .safetensors of prunet, or pytorch-fid's .npz")
    elif path.suffix == ".npz":
        if others := sorted(NEED_REAL & set(protocol.metrics) - {"fid"}):
            raise UserError(f"--real {path}: mean and covariance are not enough for {others[0]}: give the pictures")
        Moments.load(path)
    return path


def _content_hash(reference: Path | None) -> str | None:
    """Of the real pictures' features, or of what they will be made from."""
    if reference is None:
        return None
    if reference.is_dir():
        names = [f"{file_hash(path)}" for chunk in _chunks(reference) for path in chunk]
        return prompts_hash(names)[:16]
    if reference.suffix == ".npz":
        return file_hash(reference)
    return _label(reference)["content"]


def _label(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            label = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from error
    if not {"network", "content"} <= label.keys():
        raise UserError(f"{path}: not features that prunet saved (real.safetensors of a measuring)")
    return label


def _real_features(reference: Path | None, folder: Path, networks: Mapping[str, Any], protocol: Protocol) -> Any:
    """`Moments`, or features (N, D), of the real pictures; those of a folder are saved to be given again."""
    if reference is None:
        return None
    if reference.suffix == ".npz" and reference.is_file():
        return Moments.load(reference)
    name = protocol.features
    if reference.is_dir():
        features = _together(folder / "features" / f"{name}-real")[_key(protocol)]
        label = {"network": networks[name].hash, "content": str(_content_hash(reference))}
        with new_file(folder / "real.safetensors") as part:
            save_file({"features": torch.from_numpy(features).float()}, part, metadata=label)
        say(f"  features of {len(features):,} real pictures are in {folder / 'real.safetensors'}, for the next --real")
        return features
    if _label(reference)["network"] != networks[name].hash:
        raise UserError(f"{reference}: features by another network: give the pictures, or features made by this one")
    return load_file(reference)["features"].double().numpy()


def _points(protocol: Protocol, features: metrics.Array) -> metrics.Array:
    """Only the direction of CLIP's embeddings says what is in a picture; KID's kernel then is (cosine + 1)^3."""
    if protocol.features == "inception":
        return features
    return features / np.linalg.norm(features, axis=1, keepdims=True) * np.sqrt(features.shape[1])


def _key(protocol: Protocol) -> str:
    return "pool" if protocol.features == "inception" else "image"


def measured(protocol: Protocol, found: Mapping[str, Mapping[str, metrics.Array]], real: Any) -> dict[str, Measure]:
    """The protocol's metrics from features by network; `real` as `_real_features` gives it."""
    out = {}
    if isinstance(real, np.ndarray):
        real = _points(protocol, real)
    for name in protocol.metrics:
        ours = _points(protocol, found[protocol.features][_key(protocol)]) if name in NEED_REAL else np.zeros((0, 0))
        if name == "fid":
            out[name] = metrics.fid(ours, real if isinstance(real, Moments) else Moments.of(real))
        elif name == "kid":
            out[name] = metrics.kid(ours, real, min(protocol.kid_subset_size, len(real)))
        elif name in ("precision", "recall"):
            out[name] = metrics.mean_of(metrics.covered(*((ours, real) if name == "precision" else (real, ours))))
        elif name == "is":
            out[name] = metrics.inception(found["inception"]["logits"])
        else:
            per_picture = metrics.cosines if name == "clip_score" else metrics.retrieved
            out[name] = metrics.mean_of(per_picture(found["clip"]["image"], found["clip"]["text"]))
    return out


def compare(folders: Sequence[Path | str]) -> list[dict[str, Any]]:
    """The results in several folders, which must be of one protocol.

    Raises:
        UserError: a folder without a result, or two protocols (says in what they differ).
    """
    results = []
    for folder in map(Path, folders):
        if not (folder / "measures.json").is_file():
            raise UserError(f"{folder}: nothing measured there (no measures.json); `prunet measure` makes one")
        results.append(read_json(folder / "measures.json"))
    first = results[0]["protocol"]
    for folder, result in zip(map(Path, folders), results, strict=True):
        if apart := differences(first, result["protocol"]):
            key = apart[0]
            more = f" (and in {', '.join(apart[1:])})" if apart[1:] else ""
            raise UserError(
                f"{folder}: measured by another protocol than {folders[0]}: {key} is "
                f"{_brief(result['protocol'].get(key))}, not {_brief(first.get(key))}{more}; such numbers say nothing "
                "about each other"
            )
    return results


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Results by one protocol as a table, one row a model."""
    protocol, columns = results[0]["protocol"], title_rows(results[0])
    lines = ["| | " + " | ".join(f"{title} ({better} is better)" for title, better, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for result in results:
        row = [f"{c['value']:.4g} [{c['low']:.4g}, {c['high']:.4g}]" for _, _, c in title_rows(result)]
        lines.append(f"| {result['model']['source']} | " + " | ".join(row) + " |")
    lines += ["", f"{describe(protocol)}; in brackets 95 % intervals over the pictures drawn."]
    return "\n".join(lines) + "\n"
