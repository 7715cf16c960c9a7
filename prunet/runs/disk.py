"""How much disk a run takes: caches of latents and of paths, checkpoints."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prunet.data.cache import STORED
from prunet.disk.files import check_writable, read_label
from prunet.errors import UserError
from prunet.recipe.recipe import read_prompts
from prunet.training.lora import trained_count
from prunet.words import many

if TYPE_CHECKING:
    from prunet.runs.run import Run


#: What a disk keeps free beside the sums of tensors: headers, and blocks that are written aside.
SLACK = 2**22


class Need(NamedTuple):
    """Bytes that are still to be written to a folder: what they are, its nearest existing folder, how to need less."""

    what: str
    where: Path
    size: int
    less: str


def check_disk(this: "Run", todo: Sequence[str]) -> None:
    """Refuses a run whose checkpoints and caches do not fit on their disks, as far as their size is known.

    Latents and paths for each sample are known if there are prompts, or if the samples were counted. Students and
    pipelines are left out, because they are small beside the checkpoints.

    Raises:
        UserError: a disk is too small, or a folder cannot be written to.
    """
    where = check_writable(this.folder, "output")
    less = "lower keep_checkpoints" if this.recipe.keep_checkpoints > 1 else "train a smaller student"
    needs = [Need("checkpoints", where, checkpoint_bytes(this, todo), less)]
    if "cache" in todo:
        needs += _cache_needs(this)
    disks: dict[int, list[Need]] = {}
    for need in needs:
        if need.size:
            disks.setdefault(need.where.stat().st_dev, []).append(need)
    for device, same in disks.items():
        free = shutil.disk_usage(same[0].where).free
        if sum(need.size for need in same) > free:
            parts = ", ".join(f"{need.what} of {_bytes(need.size)}" for need in same)
            ways = ", ".join(dict.fromkeys(need.less for need in same))
            setting = "output" if device == where.stat().st_dev else "cache"
            raise UserError(
                f"{setting}: no room for {parts} on the disk of {same[0].where}, which has {_bytes(free)} free: "
                f"{ways}, or give {'an output' if setting == 'output' else 'a cache'} on another disk"
            )


def _bytes(count: int) -> str:
    return f"{many(count, 4)}B" if count >= 1000 else f"{count} B"


def _cache_needs(this: "Run") -> list[Need]:
    """Returns what caches of known size still take. The number of samples of pictures is known once they are read."""
    samples, data = known_samples(this), this.recipe.data
    latents, text = _tensor_bytes(this)
    each = 2 * latents + (0 if is_live(this) else text)
    less = "lower data.images_per_prompt" if data.images_per_prompt > 1 else "set a lower data.limit"
    folders = {folder for folder, _ in this.cache_specs}
    needs = [_need("latents", folder, each * (samples or 0), less) for folder in sorted(folders)]
    for folder, number in path_folders(this).items():
        less = f"set a lower stages.{number - 1}.paths or path_steps"
        needs.append(_need("paths", folder, _bytes_of_paths(this, number, samples) or 0, less))
    return needs


def path_folders(this: "Run") -> dict[Path, int]:
    """Returns the folders of paths, each with the number of the first stage that learns from them."""
    return {folder: number for number, (folder, _) in reversed(this.path_specs.items())}


def _need(what: str, folder: Path, size: int, less: str) -> Need:
    """Returns what a cache still needs: nothing if it is finished; blocks that are there need no more."""
    where = check_writable(folder, "cache")
    if (folder / "cache.json").is_file() or not size:
        return Need(what, where, 0, less)
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    return Need(what, where, max(0, size - there) + SLACK, less)


def known_samples(this: "Run") -> int | None:
    """Returns the number of samples of the cache: that of a finished one, or of the recipe's prompts."""
    made, data = this.cache_folder / "cache.json", this.recipe.data
    if made.is_file():
        return int(read_label(made, ("samples",))["samples"])
    if data.source is None:
        return len(read_prompts(data.prompts or [], data.limit)) * data.images_per_prompt
    return None


def cache_bytes(this: "Run") -> dict[str, int]:
    """Returns the bytes of a sample in the caches of all stages, by part, computed from shapes."""
    latents, text = _tensor_bytes(this)
    caches = len({folder for folder, _ in this.cache_specs})
    # Mean and standard deviation.
    return {"latents": 2 * latents * caches, "text": 0 if is_live(this) else text * caches}


def path_bytes(this: "Run", samples: int | None) -> int | None:
    """Returns the bytes of all caches of paths; None if one has a path for each sample, and these are not known."""
    sizes = [_bytes_of_paths(this, number, samples) for number in path_folders(this).values()]
    return None if None in sizes else sum(size for size in sizes if size)


def _bytes_of_paths(this: "Run", number: int, samples: int | None) -> int | None:
    latents, text = _tensor_bytes(this)
    stage = this.recipe.stages[number - 1]
    count = stage.paths or samples
    return count and count * ((stage.path_steps + 1) * latents + text)


def _tensor_bytes(this: "Run") -> tuple[int, int]:
    """Returns the bytes of the latents of one picture, and of the embeddings of its caption, as a cache stores them."""
    architecture, config = this.teacher.architecture, this.teacher.unet_config
    inputs = architecture.example_inputs(config, latent_size=this.latent_size, device="meta")
    encoders = [this.teacher.part_config(part) for part in this.teacher.text_encoders]
    tokens = max(encoder.get("max_position_embeddings", 77) for encoder in encoders)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1].expand(-1, tokens, -1)
    given = [value for name, value in inputs.items() if name not in ("sample", "timestep")]
    tensors = [tensor for value in given for tensor in (value.values() if isinstance(value, dict) else [value])]
    channels = this.teacher.part_config("vae").get("latent_channels", 4)
    return STORED.itemsize * channels * math.prod(this.latent_size), STORED.itemsize * sum(t.numel() for t in tensors)


def is_live(this: "Run") -> bool:
    """Returns whether captions are embedded while training."""
    return this.recipe.data.text == "live"


def checkpoint_bytes(this: "Run", todo: Sequence[str]) -> int:
    """Returns the bytes that new checkpoints of the stages in `todo` need: the kept ones, and one being written."""
    need, largest = 0, 0
    for number, (stage, derived) in enumerate(zip(this.recipe.stages, this.steps_down, strict=True), 1):
        if f"stage-{number}" not in todo:
            continue
        # Trained weights, their average and two moments, in fp32.
        size = 16 * trained_count(derived.student_config, stage.rank)
        need += size * min(this.recipe.keep_checkpoints, -(-stage.steps // this.recipe.checkpoint_every))
        need -= sum(f.stat().st_size for f in this.folder.glob(f"stage-{number}/checkpoints/*/*"))
        largest = max(largest, size)
    return max(0, need) + largest
