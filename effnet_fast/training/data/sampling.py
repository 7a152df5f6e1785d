"""Which images a process reads in which order: every image exactly once per epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast.training.data.decoding import Draw

WINDOW = 8  # shards that are mixed with each other
DEALT = ("length", "batch", "seed", "world", "shuffle", "blocks")  # what the order depends on


class EpochSampler:
    """Deals the images of an epoch to the processes, batch by batch.

    All processes have the same number of batches, and every image comes once. Batches of one step
    differ in size by 1 at most. A rest that is too small to give every process two images joins the
    step before, for batch norm needs two. The order depends on seed and epoch alone, and without
    `blocks` a step's images do not depend on how many processes share them.

    Args:
        length: number of images.
        batch: images per process and step.
        seed: of the order.
        rank, world: this process, of how many.
        shuffle: whether the order is drawn anew in every epoch.
        blocks: sizes of shards that lie one after the other in the list, their sum the length.
            Every process then reads shards of its own, a few of them mixed at a time, and parts of
            two shards at most go to two processes.

    Raises:
        ValueError: an argument out of range; fewer images than processes.
    """

    def __init__(
        self,
        length: int,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        blocks: Sequence[int] | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch!r}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0 to {world - 1}, got {rank!r}")
        if length < world:
            raise ValueError(f"{length} images for {world} processes: each needs at least one")
        if blocks is not None and sum(blocks) != length:
            raise ValueError(f"blocks hold {sum(blocks)} images, but there are {length}")
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.blocks = None if blocks is None else list(blocks)
        self.epoch = 0
        self.position = 0  # batches that have been handed out in this epoch

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; the position returns to 0 unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        """Batches of an epoch, those included that have been handed out."""
        steps, rest = divmod(self.length, self.batch * self.world)
        return max(1, steps + (rest >= 2 * self.world))

    def total(self, position: int) -> int:
        """Images of all processes in one step."""
        whole = self.batch * self.world
        return self.length - position * whole if position == len(self) - 1 else whole

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches from `position` on; `loading` moves the position."""
        order = self._order()
        for position in range(self.position, len(self)):
            low, high = self._bounds(position)
            yield order[low:high].tolist()

    def _bounds(self, position: int) -> tuple[int, int]:
        """Where this process's batch lies in the epoch's order."""
        if self.blocks is None:
            first, total = position * self.batch * self.world, self.total(position)
            low, high = (_share(total, r, self.world) for r in (self.rank, self.rank + 1))
            return first + low, first + high
        low = _share(self.length, self.rank, self.world) + position * self.batch
        if position < len(self) - 1:
            return low, low + self.batch
        return low, _share(self.length, self.rank + 1, self.world)

    def _order(self) -> Tensor:
        """All images of the epoch, int64 [length]."""
        seed = Draw(self.seed, self.epoch).number() >> 1  # a generator takes 63 bits
        generator = torch.Generator().manual_seed(seed)
        if not self.shuffle:
            return torch.arange(self.length)
        if self.blocks is None:
            return torch.randperm(self.length, generator=generator)
        shards = torch.arange(self.length).split(self.blocks)
        drawn = torch.randperm(len(shards), generator=generator).tolist()
        order = torch.cat([shards[number] for number in drawn])
        ends = [0, *itertools.accumulate(self.blocks[number] for number in drawn)]
        # A window ends where a process's share does, or its images would lie in others' shards.
        cuts = {*ends[::WINDOW], *(_share(self.length, r, self.world) for r in range(self.world))}
        for low, high in itertools.pairwise([*sorted(cuts), self.length]):
            order[low:high] = order[low:high][torch.randperm(high - low, generator=generator)]
        return order

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was handed out."""
        return {name: getattr(self, name) for name in (*DEALT, "epoch", "position")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another sampler stood.

        Raises:
            ValueError: that one dealt otherwise: another length, batch, seed, ...
        """
        for name in DEALT:
            mine = getattr(self, name)
            if state[name] != mine:
                raise ValueError(f"the run was begun with {name} {state[name]}, now it is {mine}")
        self.epoch, self.position = state["epoch"], state["position"]


def dealt(length: int, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[range]:
    """A process's batches of images in order, for evaluation.

    All processes have the same number of batches, the last of which may be empty. Batches are those
    of one process, dealt one by one, so that every image has the same neighbours.

    Args:
        length: number of images.
        batch: images per batch.
        rank, world: this process, of how many.
    """
    count = -(-length // (batch * world))
    for number in range(rank, count * world, world):
        yield range(min(number * batch, length), min((number + 1) * batch, length))


def _share(length: int, rank: int, world: int) -> int:
    """Where a process's share of a sequence begins."""
    return length * rank // world
