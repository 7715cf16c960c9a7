"""What folders for runtimes other than torch have in common: how they are read and written, their facts and README."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prunet.console import progress
from prunet.disk.files import write_json
from prunet.disk.seals import verify
from prunet.exports.card import model_card
from prunet.exports.traced import Part, open_decoder, parts
from prunet.recipe.values import Drawing
from prunet.sampling.made_for import write_made_for
from prunet.teacher.teacher import Teacher

Written = TypeVar("Written")


class Source(NamedTuple):
    """A pipeline that is written for another runtime, and what decodes for it."""

    teacher: Teacher
    vae: Any


def open_source(pipeline: Path | str, decoder: Path | str | None = None) -> Source:
    """Opens a stock pipeline folder. `decoder`: a folder of an `AutoencoderTiny`, in place of the decoder of its VAE.

    Raises:
        UserError: a damaged folder, or a decoder that does not fit.
    """
    verify(Path(pipeline), f"delete {pipeline} and export it again")
    teacher = Teacher(pipeline, only_draw=True)
    return Source(teacher, open_decoder(decoder, teacher) if decoder else teacher.vae)


def write_pipeline(
    source: Source, folder: Path, drawing: Drawing, write: Callable[[Part, Path], Written]
) -> dict[str, Written]:
    """Writes the layout of a diffusers folder: each model by `write` into a folder of its name, beside its config;
    tokenizers, the scheduler for `drawing`, and `model_index.json`. Returns what `write` returned, by name.
    """
    teacher, configs, written = source.teacher, source.teacher.configs(), {}
    names = [name.replace("text_encoder", "tokenizer") for name in teacher.text_encoders]
    for name in (*names, "scheduler"):
        shutil.copytree(configs / name, folder / name)
    shutil.copyfile(configs / "model_index.json", folder / "model_index.json")
    write_made_for(folder, drawing)
    with progress("Converting", 2 + len(names)) as bar:
        for name, part in parts(*source):
            bar.advance(0, note=name)
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(part.config, indent=2, default=str) + "\n")
            written[name] = write(part, folder / name)
            bar.advance()
    return written


def write_facts(
    source: Source, folder: Path, form: str, facts: dict[str, Any], drawing: Drawing, card: dict[str, Any]
) -> dict[str, Any]:
    """Writes `form`.json with `facts` and what is true of each form, and the README by the template of the form.

    `card`: more for the README; its `prompt` is an example. Returns the facts.
    """
    teacher = source.teacher
    step = teacher.vae_scale * teacher.architecture.side_step(teacher.unet_config)
    common = {"decoder": type(source.vae).__name__, "size": teacher.native_size, "step": step}
    common |= {"pipeline": teacher.fingerprint()}
    facts = {**facts, **common, "made_for": drawing.model_dump()}
    write_json(folder / f"{form}.json", facts)
    readme = model_card({**card, **facts, "drawing": drawing, "template": f"{form}.md.j2"})
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return facts
