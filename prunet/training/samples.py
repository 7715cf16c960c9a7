"""What the denoiser sees at each step: chosen by seed, step and place in the batch, and by nothing else."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunet.data.cache import STORED, Cache
from prunet.denoisers.condition import Condition
from prunet.errors import UserError
from prunet.hashing import seed_of
from prunet.recipe.stage import Stage
from prunet.recipe.training import Training
from prunet.teacher.process import DDPM
from prunet.teacher.teacher import Teacher

FAKE_UPDATES = 2  # of the fake score for one of the student, if the objective is `distribution`


class Samples(Dataset[dict[str, Any]]):
    """What the denoiser sees at (step, position in the batch): a pure function of these two and the seed.

    So it depends neither on the micro-batch nor on the number of processes, and a resumed run needs no generator
    state. An item: `latents` and `noise` (C, h, w), `timestep` (), `condition`.
    """

    def __init__(self, cache: Cache, stage: Training, seed: int, process: DDPM) -> None:
        self.cache, self.stage, self.seed, self.process = cache, stage, seed, process
        self.unconditional = cache.unconditional

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        step, position = at
        rng = torch.Generator().manual_seed(seed_of(self.seed, step, position))
        item = self._item(self._choose(step, position), rng)
        if torch.rand((), generator=rng) < self.stage.caption_dropout:
            # The picture keeps its sizes.
            item["condition"] = Condition(item["condition"] | self.unconditional.row(0))
        return item

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the objective gets of a batch of items."""
        return batch

    def _item(self, number: int, rng: torch.Generator) -> dict[str, Any]:
        """What is seen of a sample, with its caption."""
        sample = self.cache.sample(number)
        latents = sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)
        noise = torch.randn(sample.mean.shape, generator=rng)
        timestep = self.process.random_timestep(rng)
        return {"latents": latents, "noise": noise, "timestep": timestep, "condition": sample.condition}

    def _choose(self, step: int, position: int) -> int:
        """The number of a sample. A batch has one size; an epoch has about as many batches of a size as it has samples,
        in random order, and each size goes through its samples in an order of its own.
        """
        size = self.stage.batch_size
        shares = tuple(max(1, round(len(group) / size)) for group in self.cache.groups)
        epoch, at = divmod(step, sum(shares))
        chosen, before = _batch_order(self.seed, epoch, shares)[at]
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
    """The same for a subject, with a sample of its class beside each of it (`class_latents`, `class_noise`, ...)."""

    def __init__(self, cache: Cache, classes: Cache, stage: Training, seed: int, process: DDPM) -> None:
        super().__init__(cache, stage, seed, process)
        self._classes = Samples(classes, stage, seed_of(seed, "class"), process)

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        return super().__getitem__(at) | {f"class_{name}": value for name, value in self._classes[at].items()}


class PathSamples(Samples):
    """The same for a cache of paths. An item: `noisy` and `landed` (C, h, w), where a jump begins and ends, at
    `timestep` and `after` (), `condition`.
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
    """The same as `Samples` for a cache of paths: with this noise, the latents that a path ends in are at this timestep
    where the path is.

    `times` (n,): the timesteps of a path's points but the last.
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


class DistributionSamples(PathSamples):
    """The same with where the student begins, `start` (C, h, w), and `noises` (n, C, h, w) and `timesteps` (n,) at
    which what it draws is judged (the first), and the fake score learns (the rest).
    """

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        item = super().__getitem__(at)
        rng = torch.Generator().manual_seed(seed_of(self.seed, "distribution", *at))
        fresh, *noises = torch.randn(2 + FAKE_UPDATES, *item["noisy"].shape, generator=rng)
        path, _ = self.cache.path(self._choose(*at))
        edge = self.process.num_timesteps // 50  # at both ends of the schedule the judgement says nothing
        judged = torch.randint(edge, self.process.num_timesteps - edge, (), generator=rng)
        timesteps = [judged, *(self.process.random_timestep(rng) for _ in range(FAKE_UPDATES))]
        return item | {
            "start": path[0] if self.stage.jump_weight else fresh,
            "noises": torch.stack(noises),
            "timesteps": torch.stack(timesteps),
        }


class LatentSamples(Samples):
    """The same for a decoder. An item: `latents` (C, h, w)."""

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Any]:
        step, position = at
        sample = self.cache.sample(self._choose(step, position))
        rng = torch.Generator().manual_seed(seed_of(self.seed, step, position))
        return {"latents": sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)}


@lru_cache(maxsize=4)
def _batch_order(seed: int, epoch: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, how many batches of it came before in this epoch) of each batch of an epoch."""
    batches = [group for group, share in enumerate(shares) for _ in range(share)]
    counts = [0] * len(shares)
    order = []
    for i in _permutation(seed, epoch, len(batches)).tolist():
        order.append((batches[i], counts[batches[i]]))
        counts[batches[i]] += 1
    return order


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Of range(count); int32, because those of the last epochs and of all sizes are kept."""
    rng = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    return torch.randperm(count, generator=rng, dtype=torch.int32)


def batches(samples: Samples, start: int, micro_batch: int, rank: int = 0, ranks: int = 1) -> Iterator[dict[str, Any]]:
    """The micro-batches of process `rank`, from step `start` on."""
    share = micro_batch * ranks

    def places() -> Iterator[list[tuple[int, int]]]:
        for step in range(start, samples.stage.steps):
            for first in range(rank * micro_batch, samples.stage.batch_size, share):
                yield [(step, position) for position in range(first, first + micro_batch)]

    cuda = torch.cuda.is_available()
    try:
        loader = DataLoader(samples, batch_sampler=places(), num_workers=4 if cuda else 0, pin_memory=cuda)
        yield from map(samples.complete, loader)
    except UserError as error:  # of a worker, before whose message torch puts a traceback
        raise UserError(str(error).rpartition("prunet.errors.UserError: ")[2]) from error
