"""How the processes of torchrun share the images of eval and predict."""

from __future__ import annotations

import contextlib
import datetime
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

PATIENCE = datetime.timedelta(days=7)  # for the slowest process
Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """This process's part of the work; of one that is alone, all of it.

    Args:
        rank, world: its number, and how many processes there are.
    """

    rank: int = 0
    world: int = 1

    def has(self, path: str) -> bool:
        """Whether a path is this process's: by its text, so that lists need not agree."""
        return self.world == 1 or zlib.crc32(path.encode()) % self.world == self.rank

    def dealt(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a sequence that is the same in all processes."""
        return list(items[self.rank :: self.world])

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            torch.distributed.barrier()

    def gather(self, item: Item) -> list[Item]:
        """The items of all processes, by rank; each has the whole list."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(items, item)
        return items

    def add_up(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum over all processes of an array that each has."""
        if self.world == 1:
            return array
        is_nccl = torch.distributed.get_backend() == "nccl"
        values = torch.from_numpy(array.copy()).to("cuda" if is_nccl else "cpu")
        torch.distributed.all_reduce(values)
        return values.cpu().numpy()


@contextlib.contextmanager
def torchrun() -> Iterator[Share]:
    """The share of a process that torchrun started, the whole work of any other."""
    from torch import distributed

    found = distributed.is_available() and distributed.is_initialized()
    if not found and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Share()
        return
    if not found:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Share(distributed.get_rank(), distributed.get_world_size())
    finally:
        if not found:
            distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one of torchrun that prints; any other process is."""
    return os.environ.get("RANK", "0") == "0"
