"""Batches of decoded images, read by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast.training.sampling import EpochSampler
from effnet_fast.training.sources import ImageList


class Problem(NamedTuple):
    """An image that could not be read."""

    index: int  # in its list
    path: str
    reason: str


class Batch(NamedTuple):
    """Images that were read together. Unreadable ones are left out and listed."""

    images: Tensor  # uint8 [N,3,R,R], channels_last
    labels: Tensor  # int64 [N]; -1 where the list has no labels
    indices: Tensor  # int64 [N], in the list
    problems: tuple[Problem, ...]
    total: int  # images of this step in all processes, before unreadable ones were left out


class UnreadableLimitError(ValueError):
    """More images could not be read than the user allows."""


class Loader:
    """Reads batches of a list, with worker processes that live until `close`.

    Use it as a context manager where several epochs are read: workers start once.

    Args:
        images: of `open_images`.
        workers: number of processes (default: one per core this process may use); 0 reads in this
            process.
        seed: of the crops, which depend on (seed, epoch, index) alone.
        unreadable_limit: how many unreadable images end the reading with an error (default: none).
        in_turn: whether workers rest while the caller computes (default: unless CUDA is there).
        pin: whether batches lie in pinned memory (default: where CUDA is there).
    """

    def __init__(
        self,
        images: ImageList,
        *,
        workers: int | None = None,
        seed: int = 0,
        unreadable_limit: int | None = None,
        in_turn: bool | None = None,
        pin: bool | None = None,
    ) -> None:
        self.images = images
        self.seed = seed
        self.unreadable_limit = unreadable_limit
        self.problems = 0  # unreadable images so far

    def batches(
        self, order: EpochSampler | Iterable[Sequence[int]], crop: Any, *, epoch: int = 0
    ) -> Iterator[Batch]:
        """Reads an epoch.

        Args:
            order: a sampler, whose epoch is used and whose position is moved as batches are
                handed out; or the indices of each batch.
            crop: of `effnet_fast.training.decoding`; another one at each call, where wanted.
            epoch: where `order` is no sampler.

        Raises:
            UnreadableLimitError: names the first unreadable images.
        """
        sampler = order if isinstance(order, EpochSampler) else None
        if sampler is not None:
            epoch = sampler.epoch
        position = 0 if sampler is None else sampler.position
        items = self.images.with_crop(crop, seed=self.seed, epoch=epoch)
        for indices in order:
            samples = [items[i] for i in indices]
            good = [s for s in samples if s.image is not None]
            problems = tuple(
                Problem(s.index, self.images.paths[s.index], s.reason)
                for s in samples
                if s.reason is not None
            )
            x = torch.stack([s.image for s in good]) if good else torch.zeros(0, 3, crop.size, crop.size, dtype=torch.uint8)  # fmt: skip
            total = len(samples)
            if sampler is not None:
                total = sampler.total(position)
                position += 1
                sampler.position = position
            yield Batch(
                x.contiguous(memory_format=torch.channels_last),
                torch.tensor([s.label for s in good], dtype=torch.int64),
                torch.tensor([s.index for s in good], dtype=torch.int64),
                problems,
                total,
            )

    def close(self) -> None:
        """Ends the workers."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(
    images: ImageList,
    order: EpochSampler | Iterable[Sequence[int]] | None,
    crop: Any,
    *,
    batch: int = 32,
    epoch: int = 0,
    **options: Any,
) -> Iterator[Batch]:
    """Reads a list once: `Loader.batches` with workers that end with the iteration.

    Args:
        order: as in `Loader.batches`; None reads all images in order, `batch` at a time.
        options: of `Loader`.
    """
    if order is None:
        n = len(images)
        order = (range(i, min(i + batch, n)) for i in range(0, n, batch))
    with Loader(images, **options) as loader:
        yield from loader.batches(order, crop, epoch=epoch)
