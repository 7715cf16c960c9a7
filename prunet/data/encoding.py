"""The cache: latents and prompt embeddings, made once by the teacher's frozen parts and labelled.

A cache folder holds `spec.json` (what it is made of), `shard-00000.safetensors` ... (256 samples each: `mean` and `std`
(N, 4, h, w) of the scaled latents, `prompt_embeds` (N, 77, D), for SDXL `pooled` (N, P) and `time_ids` (N, 6)),
with `buckets` one `mean.I` and `std.I` a sample instead, because their sizes differ,
`unconditional.safetensors`, and, once it is whole, `cache.json` with the number of samples, the pictures skipped and
the number of captions cut.
A shard is whole or not there, and depends on nothing but the spec, so a killed run resumes at the first missing one. It
carries a checksum, which a process verifies when it first reads it.
"""

import bisect
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunet import processes
from prunet.console import progress, say
from prunet.data.listing import source_name
from prunet.data.pictures import BrokenPicture, Picture, bucket_sizes, fit, nearest_size
from prunet.data.sources import check_source, has_files, read_pictures, source_files
from prunet.disk.files import new_file, read_json, read_label, write_json
from prunet.disk.ownership import check_place, hold
from prunet.disk.seals import CHECKSUM, checksum
from prunet.errors import UserError
from prunet.recipe.recipe import Data, read_prompts
from prunet.teacher.teacher import PromptEmbeds, Teacher, after_overflow

FORMAT = 2
SHARD = 256
ENCODE_BATCH = 16
STORED = torch.float16


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser meets it: mean and std (4, h, w), prompt embeddings (77, D), SDXL's extras."""

    mean: Tensor
    std: Tensor
    embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None


@dataclass(frozen=True)
class Cache:
    """A whole cache folder, opened for reading; samples are read from disk when asked for."""

    folder: Path
    spec: dict[str, Any]
    counts: tuple[int, ...]  # samples in each shard
    skipped: tuple[tuple[str, str], ...]  # key of a picture, and why it could not be used
    groups: tuple[Sequence[int], ...]  # the samples of each size, by number

    @classmethod
    def open(cls, folder: Path | str) -> "Cache":
        """Opens a finished cache and checks that its shards are all there and whole.

        Raises:
            UserError: not a cache, not finished, or a shard that does not match its label.
        """
        folder = Path(folder)
        _opened.cache_clear()  # of a cache that was deleted and made again the old files would still be open
        if not (folder / "cache.json").is_file():
            raise UserError(f"{folder}: no finished cache there; make it with `prunet cache RECIPE`")
        keys = ("counts", "skipped", "groups", "samples")
        index = read_label(folder / "cache.json", keys, "delete it and run the cache again")
        cache = cls(
            folder,
            read_spec(folder),
            tuple(index["counts"]),
            tuple(map(tuple, index["skipped"])),
            tuple(index["groups"] or [range(index["samples"])]),
        )
        for shard, count in enumerate(cache.counts):
            found = _shard_label(_shard_path(folder, shard))["count"]
            if found != count:
                raise UserError(f"{_shard_path(folder, shard)}: {found} samples, {count} expected: delete {folder}")
        return cache

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.counts))

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w), with buckets the largest."""
        sizes = [self.sample(group[0]).mean.shape for group in self.groups]
        _, height, width = max(sizes, key=lambda shape: shape[1] * shape[2])
        return height, width

    def check(self, teacher: Teacher) -> None:
        """Refuses a cache that another teacher made."""
        other = [part for part, made_by in self.spec["parts"].items() if made_by != teacher.fingerprint([part])]
        if other:
            raise UserError(
                f"{self.folder}: made with another {' and '.join(other)} than {teacher.source} has: delete the folder, "
                "or give another one with 'cache:'"
            )

    def kept(self, spec: dict[str, Any], shard: int) -> dict[str, Tensor]:
        """What a cache of `spec` can take over from a shard of this one: latents if the VAE is the same, embeddings if
        the text encoders are, nothing if the data is another.
        """
        ours, theirs = self.spec, spec
        if (
            any(ours[key] != theirs[key] for key in spec if key != "parts")
            or ours["parts"].keys() != theirs["parts"].keys()
        ):
            return {}
        same = {part for part, made_by in theirs["parts"].items() if ours["parts"][part] == made_by}
        stems = {"mean", "std"} if {"vae", "unet"} & theirs["parts"].keys() <= same else set()
        if {part for part in theirs["parts"] if part.startswith("text_encoder")} <= same:
            stems |= {"prompt_embeds", "pooled"}
        file = _opened(_shard_path(self.folder, shard))
        return {name: file.get_tensor(name).float() for name in file.keys() if name.split(".")[0] in stems}  # noqa: SIM118

    def sample(self, index: int) -> Sample:
        shard = bisect.bisect_right(self._ends, index)
        index -= self._ends[shard] - self.counts[shard]
        file = _opened(_shard_path(self.folder, shard))
        keys = set(file.keys())

        def row(name: str) -> Tensor | None:
            if f"{name}.{index}" in keys:
                return file.get_tensor(f"{name}.{index}").float()
            return file.get_slice(name)[index : index + 1][0].float() if name in keys else None

        mean, std, embeds = row("mean"), row("std"), row("prompt_embeds")
        assert mean is not None and std is not None and embeds is not None
        return Sample(mean, std, embeds, row("pooled"), row("time_ids"))

    @property
    def unconditional(self) -> PromptEmbeds:
        """What a dropped caption becomes: (1, 77, D) and, for SDXL, (1, P)."""
        file = _opened(self.folder / "unconditional.safetensors")
        pooled = file.get_tensor("pooled").float() if "pooled" in file.keys() else None  # noqa: SIM118
        return PromptEmbeds(file.get_tensor("prompt_embeds").float(), pooled)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


@lru_cache(maxsize=512)
def _opened(path: Path) -> Any:
    """A shard, verified when this process opens it first."""
    try:
        file, found = safe_open(path, framework="pt"), path.stat()
        as_it_is = (path, found.st_ino, found.st_size, found.st_mtime_ns)
        if as_it_is not in _verified:
            label = json.loads(file.metadata()["label"])
            expected = label.pop(CHECKSUM, None)  # caches of older versions have none
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if expected not in (None, _checksum(path, tensors, label)):
                raise ValueError("its checksum is another than when it was written")
            _verified.add(as_it_is)
        return file
    except Exception as error:
        raise UserError(f"{path}: missing, damaged or of another cache ({error}): {_again(path)}") from error


_verified: set[tuple[Any, ...]] = set()


def _checksum(path: Path, tensors: dict[str, Tensor], label: dict[str, Any]) -> str:
    """Of all that a shard holds, under its name and its cache's spec."""
    spec = read_spec(path.parent)
    about = [path.name, spec, label, {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}]
    data = (tensors[name].view(-1).view(torch.uint8).numpy() for name in sorted(tensors))
    return checksum([json.dumps(about, sort_keys=True).encode(), *data])


def _shard_label(path: Path) -> dict[str, Any]:
    """`count`, `captions`, `skipped` and, with buckets, the `sizes` (h, w) of the samples."""
    if not path.is_file():
        raise UserError(f"{path}: missing: {_again(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            label: dict[str, Any] = json.loads(file.metadata()["label"])
            _ = label["count"], label["captions"], label["skipped"]
            return label
    except Exception as error:
        raise UserError(f"{path}: damaged ({error}): {_again(path)}") from error


def _again(path: Path) -> str:
    """A cache without `cache.json` goes on at the first file that is not there."""
    it = f"{path} and " if path.exists() else ""
    return f"delete {it}{path.parent / 'cache.json'} and run the cache again"


# -- making one


def cache_spec(teacher: Teacher, data: Data, seed: int, made: Path | None = None) -> dict[str, Any]:
    """What decides the bytes of a cache. `made`: a finished one, of which the pictures may be gone."""
    parts = ["vae", *teacher.text_encoders] + (["unet"] if data.prompts is not None else [])
    if data.prompts is not None:
        content = _hash([read_prompts(data.prompts, data.limit), teacher.part_config("scheduler")])
    elif made is not None and pictures_are_gone(data, made):
        content = read_spec(made)["content"]
    else:
        content = _hash(source_files(data.source or []))
    chosen = data.model_dump(mode="json", exclude={"prompts"} if data.prompts is not None else {"source"})
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
    """Whether the cache in `made` is a whole one of this source, whose pictures lay here and do no longer: they may."""
    if data.source is None or not (made / "cache.json").is_file() or has_files(data.source):
        return False
    of_the_hub = read_spec(made)["content"] == _hash([(data.source, 0)])  # as `source_files` names it
    return not of_the_hub and read_json(made / "cache.json").get("source") == data.source


def read_spec(folder: Path) -> dict[str, Any]:
    """The spec of the cache in a folder.

    Raises:
        UserError: damaged.
    """
    keys = ("format", "parts", "data", "content", "empty_prompt", "seed")
    return read_label(folder / "spec.json", keys, f"delete {folder}, or give another cache with 'cache:'")


def cache(teacher: Teacher, data: Data, folder: Path | str, *, seed: int = 1234, like: Cache | None = None) -> Cache:
    """Encodes pictures and captions (or lets the teacher draw prompts) into `folder`; goes on where it was stopped.

    From `like`, another teacher's cache of the same pictures, it takes over what this one would compute again
    (`Cache.kept`). Several processes share out the shards.

    Raises:
        UserError: nothing to read, not one usable picture, another cache in the folder, or no space left.
    """
    folder = Path(folder)
    processes.join(teacher.device)
    spec = cache_spec(teacher, data, seed, folder)
    size = int(spec["data"]["size"])
    check_size(teacher, size)
    if (folder / "spec.json").is_file():
        if read_spec(folder) != spec:
            raise UserError(
                f"{folder}: holds a cache of another teacher or other data: delete it, or give another with 'cache:'"
            )
        if (folder / "cache.json").is_file():
            return Cache.open(folder)
    elif data.source is not None:
        check_source(data.source, image_column=data.image_column, caption_column=data.caption_column)
    processes.from_main(lambda: check_place(folder, "cache", "cache"))
    with hold(folder, "cache") if processes.is_main() else nullcontext():
        processes.from_main(lambda: _begin(teacher, folder, spec))
        write_shards = _draw_prompts if data.prompts is not None else _encode_pictures
        shards = write_shards(teacher, data, folder, size, seed, lambda shard: like.kept(spec, shard) if like else {})
        processes.from_main(lambda: _finish(teacher, data, folder, shards))
    return Cache.open(folder)


def _begin(teacher: Teacher, folder: Path, spec: dict[str, Any]) -> None:
    write_json(folder / "spec.json", spec)
    empty = teacher.encode_prompts([""], unconditional=True)
    _write(folder / "unconditional.safetensors", _text_tensors(empty), {}, ["the empty prompt"], teacher)


def _finish(teacher: Teacher, data: Data, folder: Path, shards: int) -> None:
    """Writes `cache.json`, by which the cache is whole, from the labels of all its shards."""
    labels = [_shard_label(_shard_path(folder, shard)) for shard in range(shards)]
    counts = [label["count"] for label in labels]
    skipped = [(key, why) for label in labels for key, why in label["skipped"]]
    if not sum(counts):
        why = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise UserError(f"{source_name(data.source or '')}: not one usable picture with a caption{why}")
    if skipped:
        say(f"[yellow]{len(skipped)} pictures skipped[/], listed in {escape(str(folder / 'cache.json'))}:")
        for key, why in skipped[:5]:
            say(f"  {escape(f'{key}: {why}')}")
    if cut := sum(sum(teacher.are_cut(label["captions"])) for label in labels):
        say(
            f"[yellow]{cut:,} of {sum(counts):,} captions are cut:[/] they are longer than the text encoder reads "
            f"('cut' in {escape(str(folder / 'cache.json'))})"
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shape for label in labels for shape in label.get("sizes", [])):
        groups.setdefault(tuple(shape), []).append(number)
    index: dict[str, Any] = {
        "source": data.source,
        "counts": counts,
        "samples": sum(counts),
        "skipped": skipped,
        "cut": cut,
        "groups": list(groups.values()),
    }
    write_json(folder / "cache.json", index)


def check_size(teacher: Teacher, size: int, name: str = "data.size") -> None:
    """Refuses a picture size (of the option `name`) that the U-Net's stages cannot halve."""
    step = _side_step(teacher)
    if size % step:
        raise UserError(f"{name}: {size} is not a multiple of {step}, which this model's stages need")


def _side_step(teacher: Teacher) -> int:
    """Pixels of which a side must be a multiple, so that the U-Net's stages can halve it."""
    return teacher.vae_scale * 2 ** (len(teacher.unet_config["block_out_channels"]) - 1)


#: What can be taken over for a shard from the cache of another teacher.
Kept = Callable[[int], dict[str, Tensor]]


def _encode_pictures(teacher: Teacher, data: Data, folder: Path, size: int, seed: int, kept: Kept) -> int:
    """Writes this process's shards; returns the number of all of them."""
    assert data.source is not None
    pictures = read_pictures(data.source, image_column=data.image_column, caption_column=data.caption_column)
    stream = itertools.islice(pictures, data.limit)
    with progress("Encoding pictures", data.limit) as bar:
        for shard in itertools.count():
            group = list(itertools.islice(stream, max(1, SHARD // data.views)))
            if not group:
                return shard
            path = _shard_path(folder, shard)
            if processes.is_mine(shard) and not path.is_file():
                _encode_shard(teacher, data, path, group, size, seed, kept(shard))
            bar.advance(len(group))
    raise AssertionError("unreachable")


def _encode_shard(
    teacher: Teacher, data: Data, path: Path, group: list[Picture], size: int, seed: int, kept: dict[str, Tensor]
) -> None:
    fitted, captions, skipped, keys = [], [], [], []
    sizes = bucket_sizes(size, _side_step(teacher)) if data.buckets else [(size, size)]
    for picture in group:
        try:
            image = picture.open()
        except BrokenPicture as error:
            skipped.append((error.key, error.why))
            continue
        for view in range(data.views):
            number = seed_of(seed, picture.key, view)
            fitted.append(fit(image, nearest_size(image, sizes), crop=data.crop, flip=data.flip, seed=number))
            captions.append(picture.captions[number % len(picture.captions)])
            keys.append(picture.key)
    label: dict[str, Any] = {"captions": captions, "skipped": skipped, "count": len(captions)}
    tensors = dict(kept)
    if not any(name.startswith("mean") for name in kept):
        tensors |= _encode(teacher, [f.pixels for f in fitted], data.buckets)
    if "prompt_embeds" not in kept:
        tensors |= _concat([_text_tensors(teacher.encode_prompts(captions[at])) for at in _slices(len(captions))])
    if teacher.kind == "sdxl":
        ids = [(*f.original_size, *f.crop_top_left, *f.pixels.shape[1:]) for f in fitted]
        tensors["time_ids"] = torch.tensor(ids, dtype=torch.float32)
    if data.buckets:
        label["sizes"] = [tensors[f"mean.{i}"].shape[1:] for i in range(len(fitted))]
    _write(path, tensors, label, keys, teacher)


def _slices(count: int) -> list[slice]:
    return [slice(start, start + ENCODE_BATCH) for start in range(0, count, ENCODE_BATCH)]


def _encode(teacher: Teacher, pixels: list[Tensor], buckets: bool) -> dict[str, Tensor]:
    """`mean` and `std` (N, 4, h, w); with buckets `mean.I` and `std.I` (4, h, w), encoded together by size."""
    numbers = sorted(range(len(pixels)), key=lambda i: tuple(pixels[i].shape))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for _, same in itertools.groupby(numbers, key=lambda i: tuple(pixels[i].shape)):
        group = list(same)
        for at in _slices(len(group)):
            mean, std = teacher.encode_images(torch.stack([pixels[i] for i in group[at]]))
            found |= {i: (mean[k], std[k]) for k, i in enumerate(group[at])}
    parts = {"mean": [found[i][0] for i in range(len(pixels))], "std": [found[i][1] for i in range(len(pixels))]}
    if buckets:
        return {f"{name}.{i}": tensor for name, tensors in parts.items() for i, tensor in enumerate(tensors)}
    return {name: torch.stack(tensors) if tensors else torch.zeros(0, 4, 1, 1) for name, tensors in parts.items()}


def _draw_prompts(teacher: Teacher, data: Data, folder: Path, size: int, seed: int, kept: Kept) -> int:
    """The teacher draws the prompts itself; the latents are its own, so their standard deviation is 0."""
    from prunet.exports.folder import set_sampler

    assert data.prompts is not None
    prompts = read_prompts(data.prompts, data.limit)
    work = [(p, i, text) for p, text in enumerate(prompts) for i in range(data.images_per_prompt)]
    pipe: Any = None
    with progress("Drawing with the teacher", len(work)) as bar:
        starts = range(0, len(work), SHARD)
        for shard, start in enumerate(starts):
            path = _shard_path(folder, shard)
            group = work[start : start + SHARD]
            if processes.is_mine(shard) and not path.is_file():
                pipe = pipe or set_sampler(teacher.pipeline(), "dpmsolver++")
                rows = []
                for at in range(0, len(group), ENCODE_BATCH):
                    rows.append(_draw_batch(teacher, pipe, data, group[at : at + ENCODE_BATCH], size, seed))
                    bar.advance(len(rows[-1]["mean"]))
                texts = [text for _, _, text in group]
                _write(path, _concat(rows), {"captions": texts, "skipped": [], "count": len(group)}, texts, teacher)
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
    text = _text_tensors(teacher.encode_prompts(texts))
    if teacher.kind == "sdxl":
        text["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]] * len(texts), dtype=torch.float32)
    return {"mean": latents, "std": torch.zeros_like(latents), **text}


def _text_tensors(text: PromptEmbeds) -> dict[str, Tensor]:
    return {"prompt_embeds": text.embeds} | ({} if text.pooled is None else {"pooled": text.pooled})


def _concat(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _write(
    path: Path, tensors: dict[str, Tensor], label: dict[str, Any], names: Sequence[str], teacher: Teacher
) -> None:
    """Stores in half precision, except micro-conditioning: half cannot hold every size in pixels.

    `names`: what each row of the tensors was made of, a picture's key or a prompt.
    """
    stored = {n: t.to("cpu", t.dtype if n == "time_ids" else STORED).contiguous() for n, t in tensors.items()}
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
    label = {**label, CHECKSUM: _checksum(path, stored, label)}
    with new_file(path) as part:
        # One entry, because safetensors writes several in any order, and equal caches should be equal bytes.
        save_file(stored, part, metadata={"label": json.dumps(label)})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def seed_of(*names: int | str) -> int:
    """A seed for what has these names, such as a picture's key and view; no two of them are related."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, names)).encode()).digest()[:7], "big")
