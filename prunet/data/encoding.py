"""Encoding: the teacher's frozen parts turn pictures and captions, or prompts, into a cache."""

import itertools
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor

from prunet import processes
from prunet.console import progress, say
from prunet.data.cache import (
    BLOCK,
    FORMAT,
    MOST_NAMED,
    STORED,
    Cache,
    block_checksum,
    block_label,
    block_path,
    read_spec,
    shapes_text,
)
from prunet.data.contents import has_files, hub_fingerprint, remember, source_fingerprint
from prunet.data.listing import source_name
from prunet.data.pictures import BrokenPicture, Picture, bucket_sizes, fit, nearest_size
from prunet.data.sources import check_source
from prunet.data.stream import numbered, sample_count
from prunet.denoisers.condition import EXACT
from prunet.disk.files import new_file, read_json, write_json
from prunet.disk.ownership import check_place, hold
from prunet.disk.seals import CHECKSUM
from prunet.errors import UserError
from prunet.hashing import json_hash, seed_of
from prunet.recipe.recipe import Data, read_prompts
from prunet.teacher.space import check_size, side_step
from prunet.teacher.teacher import Teacher, after_overflow

ENCODE_BATCH = 16


def cache_spec(teacher: Teacher, data: Data, seed: int, made: Path | None = None) -> dict[str, Any]:
    """Returns everything that a cache's bytes depend on. `made`: a finished cache; its pictures may be deleted."""
    parts = ["vae", *teacher.text_encoders] + (["unet"] if data.prompts is not None else [])
    if data.prompts is not None:
        content = json_hash([read_prompts(data.prompts, data.limit), teacher.part_config("scheduler")])
    elif made is not None and pictures_are_gone(data, made):
        content = read_spec(made)["content"]
    else:
        content = source_fingerprint(data.source or [], made, data.image_column)
    chosen = data.model_dump(mode="json", exclude={"prompts"} if data.prompts is not None else {"source"})
    if chosen["text"] == "cached":
        del chosen["text"]  # so that caches made before there was this key stay the same
    empty = "zeros" if teacher.zeros_for_empty_prompt else "encoded"
    return {
        "format": FORMAT,
        "parts": {part: teacher.fingerprint([part]) for part in sorted(parts)},
        "data": {**chosen, "size": data.size or teacher.native_size},
        "content": content,
        "empty_prompt": empty,
        "seed": seed,
    }


def pictures_are_gone(data: Data, made: Path) -> bool:
    """Returns whether the cache in `made` is finished and its pictures were deleted, which is allowed."""
    if data.source is None or not (made / "cache.json").is_file() or has_files(data.source):
        return False
    of_the_hub = read_spec(made)["content"] == hub_fingerprint(data.source)
    return not of_the_hub and _same_places(read_json(made / "cache.json").get("source"), data.source)


def _same_places(cached: Any, now: str | list[str]) -> bool:
    """Returns whether sources that are gone are those of a cache; their paths may be relative to another folder."""
    then, paths = ([value] if isinstance(value, str) else value for value in (cached or [], now))
    pairs = [(os.path.abspath(a), b) for a, b in zip_longest(then, paths, fillvalue="")]
    return all(a == os.path.abspath(b) or a.endswith(os.sep + os.path.normpath(b)) for a, b in pairs)


def cache(teacher: Teacher, data: Data, folder: Path | str, *, seed: int = 1234, like: Cache | None = None) -> Cache:
    """Encodes pictures and captions, or lets the teacher draw prompts, into `folder`; resumes where it was stopped.

    Of pictures, tensors that are the same in `like`, another teacher's cache of them, are copied from there
    (`Cache.kept`). Several processes divide the blocks among them.

    Raises:
        UserError: there is nothing to read, no usable picture, another cache in the folder, or no space left.
    """
    folder = Path(folder)
    processes.join(teacher.device)
    spec = cache_spec(teacher, data, seed, like.folder if like else folder)  # `like` remembers the same files
    size = int(spec["data"]["size"])
    check_size(teacher, size)
    if (folder / "spec.json").is_file():
        if read_spec(folder) != spec:
            raise UserError(
                f"{folder}: a cache of another teacher or other data: delete it, or give another folder with 'cache:'"
            )
        if (folder / "cache.json").is_file():
            return Cache.open(folder)
    elif data.source is not None:
        check_source(data.source, image_column=data.image_column, caption_column=data.caption_column)
    processes.from_main(lambda: check_place(folder, "cache", "cache"))
    with hold(folder, "cache") if processes.is_main() else nullcontext():
        processes.from_main(lambda: begin(teacher, data, folder, spec))
        how = teacher, data, folder, size, seed
        if data.prompts is not None:
            blocks = _draw_prompts(*how)
        else:
            blocks = _encode_pictures(*how, lambda block: like.kept(spec, block) if like else {})
        processes.from_main(lambda: finish(teacher, data, folder, blocks))
    return Cache.open(folder)


def begin(teacher: Teacher, data: Data, folder: Path, spec: dict[str, Any]) -> None:
    """Writes the first files of a cache of `spec`: the spec, and the condition of the empty prompt."""
    write_json(folder / "spec.json", spec)
    if data.source is not None:
        remember(data.source, folder, spec["content"], data.image_column)
    empty = teacher.encode_prompts([""], unconditional=True)
    write_block(folder / "unconditional.safetensors", empty, {}, ["the empty prompt"], teacher)


def finish(teacher: Teacher, data: Data, folder: Path, blocks: int) -> None:
    """Finishes the cache, and reports skipped pictures and cut captions."""
    samples, cut, count, skipped = 0, 0, 0, list[tuple[str, str]]()
    for label in block_labels(folder, blocks):
        samples, count = samples + label["count"], count + len(label["skipped"])
        skipped += label["skipped"][: MOST_NAMED - len(skipped)]
        cut += sum(teacher.are_cut(label["captions"]))
    if not samples:
        why = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise UserError(f"{source_name(data.source or '')}: no usable picture with a caption{why}")
    if skipped:
        say(f"[yellow]{count:,} pictures skipped[/], listed in {escape(str(folder / 'cache.json'))}:")
        for key, why in skipped[:5]:
            say(f"  {escape(f'{key}: {why}')}")
    if cut:
        say(
            f"[yellow]{cut:,} of {samples:,} captions are cut:[/] they are longer than the text encoder reads "
            f"('cut' in {escape(str(folder / 'cache.json'))})"
        )
    more = {"skipped_in_all": count} if count > len(skipped) else {}
    finish_cache(folder, blocks, source=data.source, skipped=skipped, cut=cut, **more)


def block_labels(folder: Path, blocks: int) -> Iterator[dict[str, Any]]:
    """The labels of all blocks, one at a time: together, the captions of a large cache would take gigabytes."""
    return (block_label(block_path(folder, block)) for block in range(blocks))


def finish_cache(folder: Path, blocks: int, **facts: Any) -> None:
    """Writes `cache.json`, which marks the cache as whole, from the labels of all blocks and `facts`."""
    counts: list[int] = []
    groups, shapes = dict[tuple[int, ...], int](), array("B")
    for label in block_labels(folder, blocks):
        counts.append(label["count"])
        shapes.extend(groups.setdefault(tuple(shape), len(groups)) for shape in label.get("sizes", []))
    sizes = [block_path(folder, block).stat().st_size for block in range(blocks)]
    about = {"counts": counts, "bytes": sizes, "samples": sum(counts), "shapes": shapes_text(shapes)}
    write_json(folder / "cache.json", {"source": None, "skipped": [], "cut": 0, **facts, **about})


#: Returns for a block the tensors to copy from another teacher's cache.
Kept = Callable[[int], dict[str, Tensor]]


def _encode_pictures(teacher: Teacher, data: Data, folder: Path, size: int, seed: int, kept: Kept) -> int:
    """Writes the blocks of this process; returns the number of blocks of all processes."""
    assert data.source is not None
    pictures, count = max(1, BLOCK // data.views), 0  # keys in a block; all keys

    def is_needed(block: int) -> bool:
        return processes.is_mine(block) and not block_path(folder, block).is_file()

    def are_needed(numbers: range) -> bool:
        return bool(numbers) and any(map(is_needed, range(numbers[0] // pictures, numbers[-1] // pictures + 1)))

    with progress("Encoding pictures", sample_count(data)) as bar:
        for block, group in itertools.groupby(numbered(data, folder, are_needed), key=lambda at: at[0] // pictures):
            if is_needed(block):
                whole = [picture for _, picture in group if picture is not None]
                encode_block(teacher, data, block_path(folder, block), whole, size, seed, kept(block), bar.advance)
                count = block * pictures + len(whole)
            else:
                last = max(number for number, _ in group)
                bar.advance((last + 1 - count) * data.views)
                count = last + 1
    return -(-count // pictures)


def encode_block(
    teacher: Teacher,
    data: Data,
    path: Path,
    group: list[Picture],
    size: int,
    seed: int,
    kept: dict[str, Tensor],
    advance: Callable[[int], None],
) -> None:
    """Writes a block of pictures with their captions; `kept`: tensors that another cache has already.

    `advance` is told the number of samples after each batch, because a block may take minutes.
    """
    fitted, captions, skipped, keys = [], [], [], []
    sizes = bucket_sizes(size, side_step(teacher)) if data.buckets else [(size, size)]
    for picture in group:
        try:
            image = picture.open()
        except BrokenPicture as error:
            skipped.append((error.key, error.why))
            advance(data.views)
            continue
        for view in range(data.views):
            number = seed_of(seed, picture.key, view)
            fitted.append(fit(image, nearest_size(image, sizes), crop=data.crop, flip=data.flip, seed=number))
            captions.append(picture.captions[number % len(picture.captions)])
            keys.append(picture.key)
    label: dict[str, Any] = {"captions": captions, "skipped": skipped, "count": len(captions)}
    tensors = dict(kept)
    if any(name.startswith("mean") for name in kept):
        advance(len(fitted))
    else:
        tensors |= _encode(teacher, [f.pixels for f in fitted], data.buckets, advance)
    if data.text == "cached" and "prompt_embeds" not in kept:
        tensors |= _concat([teacher.encode_prompts(captions[at]) for at in _slices(len(captions))])
    tensors |= teacher.size_condition([(*f.original_size, *f.crop_top_left, *f.pixels.shape[1:]) for f in fitted])
    if data.buckets:
        label["sizes"] = [tensors[f"mean.{i}"].shape[1:] for i in range(len(fitted))]
    write_block(path, tensors, label, keys, teacher)


def draw_batch(height: int, width: int) -> int:
    """Returns how many latents of this size the teacher draws at once: more if they are small, to use the GPU well."""
    return ENCODE_BATCH * max(1, 64 * 64 // (height * width))


def _slices(count: int) -> list[slice]:
    return [slice(start, start + ENCODE_BATCH) for start in range(0, count, ENCODE_BATCH)]


def _encode(teacher: Teacher, pixels: list[Tensor], buckets: bool, advance: Callable[[int], None]) -> dict[str, Tensor]:
    """Returns `mean` and `std` (N, 4, h, w); with buckets `mean.I` and `std.I` (4, h, w). A batch has one size."""
    numbers = sorted(range(len(pixels)), key=lambda i: tuple(pixels[i].shape))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for _, same in itertools.groupby(numbers, key=lambda i: tuple(pixels[i].shape)):
        group = list(same)
        for at in _slices(len(group)):
            mean, std = teacher.encode_images(torch.stack([pixels[i] for i in group[at]]))
            found |= {i: (mean[k], std[k]) for k, i in enumerate(group[at])}
            advance(len(mean))
    parts = {"mean": [found[i][0] for i in range(len(pixels))], "std": [found[i][1] for i in range(len(pixels))]}
    if buckets:
        return {f"{name}.{i}": tensor for name, tensors in parts.items() for i, tensor in enumerate(tensors)}
    return {name: torch.stack(tensors) if tensors else torch.zeros(0, 4, 1, 1) for name, tensors in parts.items()}


def _draw_prompts(teacher: Teacher, data: Data, folder: Path, size: int, seed: int) -> int:
    """Does the same as `_encode_pictures` for latents that the teacher draws from prompts; their std is 0."""
    from prunet.sampling.samplers import set_sampler

    assert data.prompts is not None
    prompts = read_prompts(data.prompts, data.limit)
    work = [(p, i, text) for p, text in enumerate(prompts) for i in range(data.images_per_prompt)]
    pipe: Any = None
    with progress("Drawing with the teacher", len(work)) as bar:
        starts = range(0, len(work), BLOCK)
        for block, start in enumerate(starts):
            path = block_path(folder, block)
            group = work[start : start + BLOCK]
            if processes.is_mine(block) and not path.is_file():
                pipe = pipe or set_sampler(teacher.pipeline(), "dpmsolver++")
                rows = []
                batch = draw_batch(size // teacher.vae_scale, size // teacher.vae_scale)
                for at in range(0, len(group), batch):
                    rows.append(_draw_batch(teacher, pipe, data, group[at : at + batch], size, seed))
                    bar.advance(len(rows[-1]["mean"]))
                texts = [text for _, _, text in group]
                label = {"captions": texts, "skipped": [], "count": len(group)}
                write_block(path, _concat(rows), label, texts, teacher)
            else:
                bar.advance(len(group))
    return len(starts)


def _draw_batch(
    teacher: Teacher, pipe: Any, data: Data, work: Sequence[tuple[int, int, str]], size: int, seed: int
) -> dict[str, Tensor]:
    texts = [text for _, _, text in work]
    generators = [torch.Generator().manual_seed(seed_of(seed, p, i)) for p, i, _ in work]
    latents = pipe(
        prompt=texts,
        num_inference_steps=data.steps,
        guidance_scale=data.guidance_scale,
        height=size,
        width=size,
        generator=generators,
        output_type="latent",
    ).images.float()
    sizes = teacher.size_condition([(size, size, 0, 0, size, size)] * len(texts))
    embeddings = teacher.encode_prompts(texts) if data.text == "cached" else {}
    return {"mean": latents, "std": torch.zeros_like(latents), **embeddings, **sizes}


def _concat(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}


def write_block(
    path: Path, tensors: Mapping[str, Tensor], label: dict[str, Any], names: Sequence[str], teacher: Teacher
) -> None:
    """Writes a block in half precision, except sizes in pixels (`EXACT`), which half precision would round.

    `names`: the picture's key or the prompt of each row, for messages.

    Raises:
        UserError: a number is not finite, or no space is left.
    """
    stored = {n: t.to("cpu", t.dtype if n in EXACT else STORED).contiguous() for n, t in tensors.items()}
    for name, tensor in stored.items():
        kind, _, number = name.partition(".")
        if not torch.isfinite(tensor).all():
            row = int(number or next(i for i, value in enumerate(tensor) if not torch.isfinite(value).all()))
            what = "latents" if kind in ("mean", "std") else "prompt embeddings"
            raise UserError(
                f"{names[row]!r}: its {what} are not finite ({name} of {path.name}): {teacher.source} overflows in "
                f"{teacher.dtype}: {after_overflow(teacher.dtype)}"
            )
    need = sum(t.numel() * t.element_size() for t in stored.values())
    if shutil.disk_usage(path.parent).free < need + 2**20:
        raise UserError(f"No space left while writing {path}; what was finished before is kept")
    label = {**label, CHECKSUM: block_checksum(path, stored, label)}
    with new_file(path) as part:
        # Only one entry, because safetensors writes several in random order, and equal caches should be equal files.
        save_file(stored, part, metadata={"label": json.dumps(label)})
