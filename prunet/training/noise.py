"""What the denoiser sees at each step: chosen by seed, step and place in the batch, and by nothing else."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunet.data.cache import Cache
from prunet.errors import UserError
from prunet.hashing import seed_of
from prunet.recipe.recipe import Stage


class Draws(Dataset[dict[str, Tensor]]):
    """What the denoiser sees at (step, position in the batch): a pure function of these two and the seed.

    So it depends neither on the micro-batch nor on the number of processes, and a resumed run needs no generator
    state. An item: `latents` and `noise` (4, h, w), `timestep` (), `embeds` (77, D), SDXL's `pooled` and `time_ids`.
    """

    def __init__(self, cache: Cache, stage: Stage, seed: int, num_timesteps: int) -> None:
        self.cache, self.stage, self.seed, self.num_timesteps = cache, stage, seed, num_timesteps
        self.unconditional = cache.unconditional

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        step, position = at
        sample = self.cache.sample(self._choose(step, position))
        rng = torch.Generator().manual_seed(seed_of(self.seed, step, position))
        latents = sample.mean + sample.std * torch.randn(sample.mean.shape, generator=rng)
        noise = torch.randn(sample.mean.shape, generator=rng)
        timestep = torch.randint(0, self.num_timesteps, (), generator=rng)
        dropped = bool(torch.rand((), generator=rng) < self.stage.caption_dropout)
        empty = self.unconditional
        item = {"latents": latents, "noise": noise, "timestep": timestep}
        item["embeds"] = empty.embeds[0] if dropped else sample.embeds
        if sample.pooled is not None and sample.time_ids is not None and empty.pooled is not None:
            item["pooled"] = empty.pooled[0] if dropped else sample.pooled
            item["time_ids"] = sample.time_ids
        return item

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


def batches(draws: Draws, start: int, micro_batch: int, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of one process, from step `start` on."""
    share = micro_batch * ranks

    def places() -> Iterator[list[tuple[int, int]]]:
        for step in range(start, draws.stage.steps):
            for first in range(rank * micro_batch, draws.stage.batch_size, share):
                yield [(step, position) for position in range(first, first + micro_batch)]

    cuda = torch.cuda.is_available()
    try:
        yield from DataLoader(draws, batch_sampler=places(), num_workers=4 if cuda else 0, pin_memory=cuda)  # type: ignore[arg-type]
    except UserError as error:  # of a worker, before whose message torch puts a traceback
        raise UserError(str(error).rpartition("prunet.errors.UserError: ")[2]) from error
