"""How to draw with a pipeline that was made for few steps without guidance.

`model_index.json` has the settings under a key that stock diffusers ignores. Stock diffusers draws with the scheduler,
which is set in the same way.
"""

import json
from pathlib import Path

from pydantic import ValidationError

from prunet.errors import UserError
from prunet.recipe.recipe import explain
from prunet.recipe.values import Drawing, EmbeddedGuidance
from prunet.sampling.samplers import SAMPLERS, check_sampler, sampler_of
from prunet.teacher.configs import read_object
from prunet.teacher.pipeline_files import PipelineFiles

KEY = "_made_for"


def made_for(pipeline: PipelineFiles) -> Drawing | None:
    """Reads the settings that a pipeline was made for; None if it has none, so that it draws like its teacher.

    Raises:
        UserError: prunet does not write such a value.
    """
    return read_made_for(pipeline.configs() / "model_index.json", pipeline.source)


def read_made_for(path: Path, source: str, fix: str = "fetch or copy it again") -> Drawing | None:
    """Does the same for a `model_index.json`; `source` begins the message if it cannot be read, and `fix` ends it."""
    value = read_object(path, source, fix).get(KEY)
    if value is None:
        return None
    fix = f"{fix}, or delete {KEY} to draw with it like with any other pipeline"
    kind = EmbeddedGuidance if isinstance(value, dict) and "guidance_range" in value else Drawing
    try:
        found = kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {KEY}: {explain(error, kind)}: {fix}") from error
    if found.sampler not in SAMPLERS:
        raise UserError(f"{path}: {KEY}: no sampler {found.sampler!r}: {fix}")
    return found


def drawing_of(pipeline: PipelineFiles, default: Drawing, asked: Drawing | None = None) -> Drawing:
    """Returns how to draw with a pipeline: what `asked` sets, else what it was made for, else `default`.

    Raises:
        UserError: there is no such sampler, or it cannot draw in so many steps; or the pipeline takes the guidance
            scale as an input and did not learn this one.
    """
    how = overridden(made_for(pipeline) or default, asked)
    if pipeline.architecture.takes_guidance(pipeline.unet_config) and not isinstance(how, EmbeddedGuidance):
        raise UserError(
            f"{pipeline.source}: its {pipeline.architecture.part} takes the guidance scale as an input, and its "
            "model_index.json does not say which scales it learned: draw with diffusers, or give another model"
        )
    check_sampler(how.sampler, how.steps, pipeline.part_config("scheduler"), pipeline.source)
    return how


def overridden(drawing: Drawing, asked: Drawing | None) -> Drawing:
    """Returns `drawing` with the values that `asked` sets; default values of `asked` do not count.

    Raises:
        UserError: a guidance scale that the model did not learn.
    """
    try:
        return drawing if asked is None else type(drawing)(**dict(drawing) | asked.model_dump(exclude_unset=True))
    except ValidationError as error:
        raise UserError(explain(error)) from error


def write_made_for(folder: Path, drawing: Drawing) -> None:
    """Writes into a pipeline folder how to draw with it: its scheduler, and the key for prunet."""
    path = folder / "model_index.json"
    index = read_object(path, str(folder))
    schedule = read_object(folder / "scheduler" / "scheduler_config.json", str(folder))
    scheduler = sampler_of(drawing.sampler, schedule)
    scheduler.save_pretrained(folder / "scheduler")
    index |= {"scheduler": ["diffusers", type(scheduler).__name__], KEY: drawing.model_dump(mode="json")}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
