"""The inputs of the denoiser at each step; they depend only on seed, step and place in the batch."""

import shutil
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunet.console import say
from prunet.data.cache import STORED, Cache
from prunet.denoisers.condition import Condition
from prunet.errors import UserError
from prunet.hashing import seed_of
from prunet.recipe.stage import Stage
from prunet.recipe.training import Training
from prunet.teacher.process import DDPM
from prunet.teacher.teacher import Teacher

#: Processes that read samples for a GPU, and micro-batches that each of them prepares.
WORKERS, PREPARED = 4, 2
#: Where such processes leave the samples for the one that trains.
SHARED_MEMORY = Path("/dev/shm")


class Samples(Dataset[dict[str, Any]]):
    """The inputs of the denoiser at (step, position in the batch), a pure function of these two and the seed.

    They therefore do not depend on the micro-batch or the number of processes, and a resumed run needs no generator
    state. An item has `latents` and `noise` (C, h, w), `timestep` () and `condition`.
    """

    def __init__(self, cache: Cache, stage: Training, seed: int, process: DDPM) -> None:
        self.cache, self.stage, self.seed, self.process = cache, stage, seed, process
        self.unconditional = cache.unconditional
        self.random_captions = isinstance(stage, Stage) and stage.random_captions
        self.guidance_range = stage.guidance_range if isinstance(stage, Stage) else None

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        step, position = at
        rng = torch.Generator().manual_seed(seed_of(self.seed, step, position))
        item = self._item(self._choose(step, position), rng)
        if self.random_captions and torch.rand((), generator=rng) < self._share_of_others(item["timestep"]):
            other = self._item(int(torch.randint(len(self.cache), (), generator=rng)), rng)["condition"]
            item["condition"] = Condition(item["condition"] | {name: other[name] for name in self.unconditional})
        if torch.rand((), generator=rng) < self.stage.caption_dropout:
            # The empty prompt replaces the caption, but not the sizes.
            item["condition"] = Condition(item["condition"] | self.unconditional.row(0))
        if self.guidance_range:
            low, high = self.guidance_range
            scale = low + (high - low) * torch.rand((), generator=rng)
            item["condition"] = Condition(item["condition"] | {"guidance_scale": scale})
        return item

    def _share_of_others(self, timestep: Tensor) -> Tensor:
        """Returns the share of samples () that see the caption of another one, at a timestep (arXiv 2504.02011)."""
        return torch.exp(-5 * (1 - timestep / self.process.num_timesteps))

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the objective gets of a batch of items."""
        return batch

    def _item(self, number: int, rng: torch.Generator) -> dict[str, Any]:
        """Returns the inputs made from a sample, with its caption."""
        sample = self.cache.sample(number)
        latents = sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)
        noise = torch.randn(sample.mean.shape, generator=rng)
        timestep = self.process.random_timestep(rng)
        return {"latents": latents, "noise": noise, "timestep": timestep, "condition": sample.condition}

    def _choose(self, step: int, position: int) -> int:
        """Returns the number of a sample.

        All samples of a batch have one size. In an epoch, the batches of a size are in proportion to its samples and in
        random order, and each size goes through its samples in its own order. If a size has too few samples for a
        batch, an epoch is so many passes over all samples that it fills one.
        """
        size, counts = self.stage.batch_size, [len(group) for group in self.cache.groups]
        passes = -(-size // min(counts))
        shares = tuple(round(passes * count / size) for count in counts)
        epoch, at = divmod(step, sum(shares))
        groups, places = _batch_order(self.seed, epoch, shares)
        chosen, before = int(groups[at]), int(places[at])
        group = self.cache.groups[chosen]
        turn, place = divmod((epoch * shares[chosen] + before) * size + position, len(group))
        return group[int(_permutation(self.seed, turn, len(group))[place])]


class LiveSamples(Samples):
    """The same for a cache without text, whose captions `teacher` embeds when a batch is complete, rounded as in a
    cache.
    """

    def __init__(self, cache: Cache, stage: Training, seed: int, teacher: Teacher) -> None:
        super().__init__(cache, stage, seed, teacher.process)
        self._teacher = teacher

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        item = super().__getitem__(at)
        dropped = "prompt_embeds" in item["condition"]  # that of the empty prompt
        condition = Condition(self.unconditional.row(0) | item["condition"])
        caption = self.cache.caption(self._choose(*at))
        return item | {"condition": condition, "caption": caption, "dropped": torch.tensor(dropped)}

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its captions embedded."""
        captions, rows = batch.pop("caption"), (~batch.pop("dropped")).nonzero().flatten()
        if len(rows):
            condition = batch["condition"].to(self._teacher.device)
            for name, told in self._teacher.encode_prompts([captions[row] for row in rows]).items():
                condition[name][rows.to(told.device)] = told.to(STORED).float()
            batch["condition"] = condition
        return batch


class SubjectSamples(Samples):
    """Samples of a subject, each with a sample of its class (`class_latents`, `class_noise`, ...)."""

    def __init__(self, cache: Cache, classes: Cache, stage: Training, seed: int, process: DDPM) -> None:
        super().__init__(cache, stage, seed, process)
        self._classes = Samples(classes, stage, seed_of(seed, "class"), process)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        return super().__getitem__(at) | {f"class_{name}": value for name, value in self._classes[at].items()}


class PathSamples(Samples):
    """Samples of a cache of paths.

    An item has `noisy` and `landed` (C, h, w), the latents at the beginning and the end of a jump, their times
    `timestep` and `after` (), and `condition`.
    """

    stage: Stage

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        step, position = at
        path, condition = self.cache.path(self._choose(step, position))
        rng, jumps = torch.Generator().manual_seed(seed_of(self.seed, step, position)), self.stage.jumps or 1
        jump, length = int(torch.randint(jumps, (), generator=rng)), (len(path) - 1) // jumps
        timestep, after = (torch.tensor(self.process.jump_time(jumps, number)) for number in (jump, jump + 1))
        noisy, landed = path[jump * length], path[(jump + 1) * length]
        return {"noisy": noisy, "landed": landed, "timestep": timestep, "after": after, "condition": condition}


class SamplesOnPaths(Samples):
    """Like `Samples`, but from a cache of paths: the noised latents lie on a path.

    `times` (n,): the timesteps of a path's points, except the last.
    """

    def __init__(self, cache: Cache, stage: Training, seed: int, process: DDPM, times: Tensor) -> None:
        super().__init__(cache, stage, seed, process)
        self._times = times

    def _item(self, number: int, rng: torch.Generator) -> dict[str, Any]:
        path, condition = self.cache.path(number)
        point = int(torch.randint(len(self._times), (), generator=rng))
        signal, noise = (factor[0] for factor in self.process.signal_and_noise(self._times[point, None]))
        latents, timestep = path[-1], self._times[point]
        given = {"latents": latents, "noise": (path[point] - signal * latents) / noise}
        return {**given, "timestep": timestep, "condition": condition}


class LatentSamples(Samples):
    """Samples for a decoder. An item has `latents` (C, h, w)."""

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        step, position = at
        sample = self.cache.sample(self._choose(step, position))
        rng = torch.Generator().manual_seed(seed_of(self.seed, step, position))
        return {"latents": sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)}


@lru_cache(maxsize=4)
def _batch_order(seed: int, epoch: int, shares: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns for each batch of an epoch its size, and the number of earlier batches of this size in the epoch."""
    batches = torch.arange(len(shares), dtype=torch.int32).repeat_interleave(torch.tensor(shares))
    groups = batches[_permutation(seed, epoch, len(batches))]
    before = torch.empty_like(groups)
    for group, share in enumerate(shares):
        before[groups == group] = torch.arange(share, dtype=torch.int32)
    return groups, before


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Returns a permutation of range(count); int32, because several of them are kept, for epochs and sizes."""
    rng = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    return torch.randperm(count, generator=rng, dtype=torch.int32)


def batches(samples: Samples, start: int, micro_batch: int, rank: int = 0, ranks: int = 1) -> Iterator[dict[str, Any]]:
    """Yields the micro-batches of process `rank`, from step `start` on."""
    share = micro_batch * ranks

    def places() -> Iterator[list[tuple[int, int]]]:
        for step in range(start, samples.stage.steps):
            for first in range(rank * micro_batch, samples.stage.batch_size, share):
                yield [(step, position) for position in range(first, first + micro_batch)]

    cuda = torch.cuda.is_available()
    workers = workers_for(samples, start, share) if cuda and start < samples.stage.steps else 0
    how: dict[str, Any] = {"prefetch_factor": PREPARED, "worker_init_fn": _ignore_signals} if workers else {}
    try:
        loader = DataLoader(samples, batch_sampler=places(), num_workers=workers, pin_memory=cuda, **how)
        yield from map(samples.complete, loader)
    except UserError as error:  # from a worker process; torch puts a traceback before the message
        raise UserError(str(error).rpartition("prunet.errors.UserError: ")[2]) from error


def workers_for(samples: Samples, start: int, at_once: int) -> int:
    """Returns how many processes read samples: none if the micro-batches that they prepare, with `at_once` samples on
    all devices, do not fit into shared memory (64 MB in a container, if nothing else is asked for).
    """
    parts = samples[start, 0].values()
    values = [value for part in parts for value in (part.values() if isinstance(part, dict) else [part])]
    size = sum(value.nbytes for value in values if isinstance(value, Tensor))
    if not SHARED_MEMORY.is_dir() or WORKERS * PREPARED * at_once * size <= shutil.disk_usage(SHARED_MEMORY).free:
        return WORKERS
    say(f"  {SHARED_MEMORY} is small, so one process reads and trains: give a container more, such as --shm-size=8g")
    return 0


def _ignore_signals(worker: int) -> None:
    """Leaves signals that the whole group of processes gets to the process that trains, which writes a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
