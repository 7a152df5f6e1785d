"""Which images a process reads in which order: every image exactly once per epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class EpochSampler:
    """Deals the images of an epoch to the processes, batch by batch.

    All processes have the same number of batches. The last images are spread evenly: the sizes of
    one step's batches differ by 1 at most, and a rest that is too small to give every process two
    images joins the step before. The order depends on seed and epoch alone.

    Args:
        length: number of images.
        batch: images per process and step.
        seed: of the order.
        rank, world: this process, of how many.
        shuffle: whether the order is drawn anew in every epoch.

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
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch!r}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, got {rank!r}")
        if length < world:
            raise ValueError(f"{length} images for {world} processes: each needs one at least")
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.epoch = 0
        self.position = 0  # batches that have been handed out in this epoch

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; the position returns to 0 unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        """Batches of an epoch, those included that have been handed out."""
        whole = self.batch * self.world
        steps, rest = divmod(self.length, whole)
        return max(1, steps + (rest >= 2 * self.world))

    def total(self, position: int) -> int:
        """Images of all processes in one step."""
        first = position * self.batch * self.world
        return (
            self.length if position == len(self) - 1 else first + self.batch * self.world
        ) - first

    def order(self) -> Sequence[int]:
        """The images of all processes in this epoch's order."""
        if not self.shuffle:
            return range(self.length)
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) & (2**63 - 1))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches from `position` on; `loading.batches` moves the position."""
        order = self.order()
        for position in range(self.position, len(self)):
            first, total = position * self.batch * self.world, self.total(position)
            low, high = (total * r // self.world for r in (self.rank, self.rank + 1))
            yield list(order[first + low : first + high])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was handed out."""
        names = ("length", "batch", "seed", "world", "shuffle", "epoch", "position")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another sampler stood.

        Raises:
            ValueError: that one dealt otherwise (length, batch, seed, world or shuffle differ).
        """
        for name in ("length", "batch", "seed", "world", "shuffle"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the run was started with {name} {state[name]}, now it is {getattr(self, name)}"
                )
        self.epoch, self.position = state["epoch"], state["position"]
