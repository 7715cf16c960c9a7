"""Measures a model by a protocol: prompts -> pictures -> features -> numbers with intervals.

The folder of a measurement::

    pictures/00000.tar ...     pictures with their prompts; spec.json: what they were drawn from
    features/NET-HASH/00000... features of each shard
    real.safetensors           features of the real pictures, for the next `--real`
    measures.json  measures.md

A stopped measurement resumes, and the processes of `accelerate launch` divide the work.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunet import __version__, processes
from prunet.disk.files import check_writable, read_label, write_json, write_text
from prunet.disk.ownership import check_place, hold
from prunet.errors import UserError
from prunet.evaluation.computing import compute
from prunet.evaluation.extraction import FEWEST, Reference, drawn_shards, extract, gather, preparation, tag
from prunet.evaluation.measures import MeasuredModel, Measures, markdown, read_measures
from prunet.evaluation.networks import INCEPTION_SOURCE, Clip, Dino, Inception
from prunet.evaluation.protocol import NEED_REAL, SUBJECT, Protocol, ProtocolFiles, differences
from prunet.recipe.prompts import prompts_hash
from prunet.recipe.values import Drawing
from prunet.runtime import Runtime
from prunet.sampling.draw import Model, open_model
from prunet.sampling.made_for import drawing_of
from prunet.sampling.paths import SCHEDULE, schedule_of
from prunet.sampling.shards import draw_shards
from prunet.teacher.space import check_size
from prunet.teacher.teacher import PARTS, Teacher
from prunet.words import brief, short


def measure(
    model: str | Path | Model,
    protocol: Protocol,
    prompts: Sequence[str],
    folder: Path | str,
    *,
    files: ProtocolFiles | None = None,
    drawing: Drawing | None = None,
    batch_size: int = 4,
) -> Measures | None:
    """Draws the prompts with a pipeline and measures the pictures; returns the result in the main process, else None.

    `model`: a pipeline, or only its source; it draws in the protocol's precision. The settings that it was made for
    override those of the protocol, and `drawing` overrides both; the result says how it drew.

    Raises:
        UserError: something is missing or does not fit, or the folder has other pictures; before anything is drawn.
    """
    files, opening = files or ProtocolFiles(), model if isinstance(model, Model) else Model(model)
    folder, source, state = Path(folder), Path(opening.source), processes.join(torch.device(opening.device))
    read = [source / "pipeline" if (source / "pipeline").is_dir() else source, *([files.real] if files.real else [])]
    check_place(folder, "measurement", "--output", read)
    device = state.device if state.num_processes > 1 else torch.device(opening.device)
    dtype = Runtime(precision=protocol.precision).dtype
    teacher = _open(replace(opening, device=device, dtype=dtype), protocol)
    said = Drawing(**protocol.model_dump(include=set(Drawing.model_fields)))
    used = drawing_of(teacher, said, drawing)
    _check_count(protocol, len(prompts))
    reference, networks = Reference.open(protocol, files), load_networks(protocol, files, device)
    spec = {
        "model": teacher.fingerprint(),
        "prompts_sha256": prompts_hash(prompts),
        **protocol.model_dump(include={"seed", "precision", "jpeg"}),
        **used.model_dump(mode="json"),
        **{"size": protocol.size or teacher.native_size, "count": len(prompts)},
    }
    spec["schedule"] = schedule_of(teacher)
    # The sampler also reads the spacing of steps, and more.
    spec["scheduler"] = {key: value for key, value in teacher.part_config("scheduler").items() if key not in SCHEDULE}
    spec["empty_prompt"] = "zeros" if teacher.zeros_for_empty_prompt else "encoded"
    _check_folder(folder / "pictures", spec)
    with _claim(folder, spec, state):
        made_by = {name: (net.hash, preparation(protocol, name)) for name, net in networks.items()}
        named = {  # those of pictures that were drawn from something else are not these
            name: folder / "features" / f"{name}-{tag(*how, json.dumps(spec))}" for name, how in made_by.items()
        }
        theirs = _real_features(reference, networks, protocol, folder, made_by, state)  # a picture may be broken
        paths = draw_shards(
            teacher.pipeline,
            prompts,
            folder / "pictures",
            used,
            seed=protocol.seed,
            size=spec["size"],
            jpeg=protocol.jpeg,
            batch_size=batch_size,
        )
        teacher.release(*PARTS)
        shards = drawn_shards(paths, len(prompts))
        for name, net in networks.items():
            extract(shards, net, protocol, named[name])
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        drawn = None if used == said else used
        found = {name: gather(shards, named[name]) for name in networks}
        hashes = {name: net.hash for name, net in networks.items()}
        result = Measures(
            model=MeasuredModel(source=short(str(source)), fingerprint=spec["model"], drawn=drawn),
            protocol=_as_used(protocol, spec, hashes, reference.content if reference else None),
            measures=compute(protocol, found, theirs),
            versions={"prunet": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
        )
        write_text(folder / "measures.md", markdown([result]))
        result.save(folder / "measures.json")
        return result


def _open(model: Model, protocol: Protocol) -> Teacher:
    """Opens a pipeline, and refuses it if it cannot draw what the protocol requires."""
    teacher = open_model(model, only_draw=True)
    check_size(teacher, protocol.size or teacher.native_size, "size")
    teacher.check_weights()
    return teacher


@contextmanager
def _claim(folder: Path, drawing: dict[str, Any], state: Any) -> Iterator[None]:
    """Locks the folder, and records what will be drawn before any process draws a picture."""
    state.wait_for_everyone()
    with hold(folder, "measurement") if state.is_main_process else nullcontext():
        if state.is_main_process:
            _check_disk(folder, drawing)
            write_json(folder / "pictures" / "spec.json", drawing)
        state.wait_for_everyone()
        yield


def _real_features(
    reference: Reference | None,
    networks: Mapping[str, Any],
    protocol: Protocol,
    folder: Path,
    made_by: Mapping[str, tuple[str, str]],
    state: Any,
) -> dict[str, Any]:
    """Extracts the features of the real pictures, if there are any; returns them by network, in the main process.

    `folder`: that of the measurement. `made_by`: for each network its hash and the preparation of pictures for it.
    """
    if reference is None:
        return {}
    found: dict[str, Any] = {}
    sets = {str(protocol.features)} if NEED_REAL & set(protocol.metrics) else set()
    wanted = {*sets, *(SUBJECT[name] for name in protocol.metrics if name in SUBJECT)}
    for name in sorted(wanted):
        extracted = folder / "features" / f"real-{tag(name, *made_by[name], reference.content)}"
        extract(reference.shards(), networks[name], protocol, extracted)
        state.wait_for_everyone()
        if not state.is_main_process:
            continue
        if name in sets:
            found[name] = reference.features(networks[name], protocol, extracted, folder / "real.safetensors")
        else:
            found[name] = gather(reference.shards(), extracted)["image"]
    return found


def _as_used(
    protocol: Protocol, drawing: Mapping[str, Any], networks: Mapping[str, str], real: str | None
) -> dict[str, Any]:
    """Returns the protocol with its defaults filled in, and with hashes of contents instead of paths and sources."""
    left_out = {
        "prompts": {"file", "source"},
        "real": {"file", "source"},
        "clip": {"file", "source"},
        "dino": {"file", "source"},
    }
    used = protocol.model_dump(mode="json", exclude=left_out)
    used |= {key: drawing[key] for key in ("size", "count", "prompts_sha256")}
    return used | {"networks": dict(networks), "real_sha256": real}


def _check_count(protocol: Protocol, count: int) -> None:
    sets = {"is", *NEED_REAL} & set(protocol.metrics)
    if sets and count < FEWEST:
        raise UserError(f"{count} prompts are too few for {sorted(sets)[0]}: {FEWEST} at least")
    if "kid" in protocol.metrics and count < protocol.kid_subset_size:
        raise UserError(f"{count:,} prompts are too few for KID with subsets of {protocol.kid_subset_size:,}")


def _check_folder(pictures: Path, drawing: dict[str, Any]) -> None:
    """Refuses a folder with pictures that were drawn from something else."""
    spec = pictures / "spec.json"
    if not spec.is_file():
        if pictures.is_dir() and any(pictures.glob("*.tar")):
            raise UserError(f"{pictures}: pictures without a spec.json: delete that folder, or give another --output")
        return
    now = {key: drawing[key] for key in ("schedule", "scheduler", "empty_prompt")}  # older folders lack them
    before = now | read_label(
        spec, drawing.keys() - now.keys(), f"delete {pictures} to draw again, or give another --output"
    )
    apart = sorted(key for key in drawing if before[key] != drawing[key])
    if apart:
        raise UserError(
            f"{pictures}: holds pictures drawn with another {', '.join(apart)}: delete that folder to draw them again, "
            "or give another --output"
        )


def _check_disk(folder: Path, drawing: Mapping[str, Any]) -> None:
    """Refuses a disk without enough space. Photographs take about 0.6 of their pixels' bytes as PNG, 0.1 as JPEG."""
    drawn, count = sum(path.stat().st_size for path in folder.glob("pictures/*.tar")), drawing["count"]
    need = count * drawing["size"] ** 2 * 3 * (0.1 if drawing["jpeg"] else 0.6) - drawn
    if shutil.disk_usage(check_writable(folder, "--output")).free < need:
        raise UserError(f"--output {folder}: {count:,} pictures need about {need / 1e6:,.1f} MB: give another disk")


def load_networks(protocol: Protocol, files: ProtocolFiles, device: torch.device | str) -> dict[str, Any]:
    """Loads the networks that the protocol's metrics need, by name.

    Raises:
        UserError: weights are missing, unknown, or for another network.
    """
    wanted = set(protocol.metrics)
    needed = {str(protocol.features)} if wanted & NEED_REAL else set()
    needed |= {"inception"} if "is" in wanted else set()
    needed |= {"clip"} if wanted & {"clip_score", "retrieval"} else set()
    needed |= {SUBJECT[name] for name in wanted & SUBJECT.keys()}
    weights, models = dict(files.weights), {"clip": protocol.clip, "dino": protocol.dino}
    if strange := set(weights) - {"inception", *models}:
        raise UserError(f"--weights {strange.pop()}=...: give inception=FILE, clip=PATH or dino=PATH")
    for name, model in models.items():
        if name in needed and model and model.file and files.beside:
            weights.setdefault(name, files.beside / model.file)
    for name in sorted(needed - weights.keys()):
        model = models.get(name)
        where = INCEPTION_SOURCE if name == "inception" else model.source if model else ""
        raise UserError(f"protocol {protocol.name} needs the weights of {name}: give --weights {name}=PATH. {where}")
    networks: dict[str, Any] = {}
    if "inception" in needed:
        networks["inception"] = Inception.load(weights["inception"], protocol.preprocessing, device)
    if "clip" in needed and protocol.clip:
        if protocol.clip.library == "open_clip":
            networks["clip"] = Clip.load_open_clip(protocol.clip.model, weights["clip"], device)
        else:
            networks["clip"] = Clip.load(weights["clip"], device)
    if "dino" in needed:
        networks["dino"] = Dino.load(weights["dino"], device)
    return networks


def compare(folders: Sequence[Path | str]) -> list[Measures]:
    """Reads the results in several folders, which must have the same protocol.

    Raises:
        UserError: a folder has no result, or two protocols differ (the message names the values).
    """
    results = [read_measures(Path(folder)) for folder in folders]
    if len({Path(folder).resolve() for folder in folders}) < len(results):
        raise UserError("compare: one folder is given twice")
    first = results[0].protocol
    for folder, result in zip(map(Path, folders), results, strict=True):
        if apart := differences(first, result.protocol):
            key = apart[0]
            more = f" (and in {', '.join(apart[1:])})" if apart[1:] else ""
            raise UserError(
                f"{folder}: measured by another protocol than {folders[0]}: {key} is "
                f"{brief(result.protocol.get(key))}, not {brief(first.get(key))}{more}; such numbers cannot "
                "be compared"
            )
    return results
