"""Batches of decoded images, read by worker processes.

Without CUDA, workers and computing share the cores. They then take turns: a group of several
batches is decoded on all cores, then computed on all cores. Two sides that compete for the cores
instead stop each other at every barrier between threads.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effnet_fast.training.data import groups
from effnet_fast.training.data.decoding import Draw, UnreadableImageError
from effnet_fast.training.data.groups import READ, Item
from effnet_fast.training.data.sampling import EpochSampler
from effnet_fast.training.data.sources import ImageList
from effnet_fast.training.data.workers import WorkerError

GROUP_BYTES = 64 << 20  # of a group's pixels
MOST = 4096  # images of a group, so that a pause is short
LEAST_PER_WORKER = 32  # images of a group, so that workers end together to within 2%
FEW = 64  # images that are read sooner than workers start
NAMED = 5  # unreadable images in an error


class Problem(NamedTuple):
    """An image that could not be read."""

    index: int  # type: ignore[assignment]  # in its list; the name hides a method of tuple
    path: str
    reason: str


class Batch(NamedTuple):
    """Images that were read together. Unreadable ones are left out and listed."""

    images: Tensor  # uint8 [N,3,R,R], channels_last; N may be 0
    labels: Tensor  # int64 [N]; -1 where the list has no labels
    indices: Tensor  # int64 [N], in the list
    problems: tuple[Problem, ...]
    total: int  # images of this step in all processes, before unreadable ones were left out


class UnreadableLimitError(ValueError):
    """More images could not be read than the user allows."""


def check_limit(count: int, limit: int | None, first: Iterable[tuple[str, str]]) -> None:
    """Refuses to go on with more unreadable images than the user allows.

    Args:
        count: of unreadable images.
        limit: how many are allowed; None means any number.
        first: path and reason of the first of them.

    Raises:
        UnreadableLimitError: there are more; the message names the first.
    """
    if limit is not None and count > limit:
        named = "; ".join(f"{path}: {reason}" for path, reason in itertools.islice(first, NAMED))
        raise UnreadableLimitError(
            f"{count} images cannot be read, and {limit} are allowed: {named}"
        )


class Loader:
    """Reads batches of a list, with worker processes that live until `close`.

    Use it as a context manager where several epochs are read: workers start once.

    Args:
        images: of `open_images`.
        workers: number of processes (default: one per core that this process may use, none for a
            list of few images); 0 reads in this process.
        seed: of the crops, which depend on (seed, epoch, image) alone.
        unreadable_limit: how many unreadable images are borne; one more ends the reading with an
            error (default: any number).
        in_turn: whether workers rest while the caller computes (default: unless CUDA is there).
        pin: whether batches lie in pinned memory (default: where CUDA is there).

    Raises:
        ValueError: a number below 0.
        TypeError: a dataset that cannot be pickled, with workers.
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
        for name, value in (("workers", workers), ("unreadable_limit", unreadable_limit)):
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if workers is None:
            workers = 0 if len(images) < FEW else default_workers()
        cuda = torch.cuda.is_available()
        self.images = images
        self.workers = workers
        self.seed = seed
        self.unreadable_limit = unreadable_limit
        self.in_turn = not cuda if in_turn is None else in_turn
        self.pin = cuda if pin is None else pin
        self.unreadable: dict[int, Problem] = {}  # so far, each image once, by its index
        self._reader = images.reader()
        self._pool: groups.Pool | None = None
        self._busy = False

    def batches(
        self, order: EpochSampler | Iterable[Sequence[int]], crop: Any, *, epoch: int = 0
    ) -> Iterator[Batch]:
        """Reads an epoch.

        Args:
            order: a sampler, whose epoch is used and whose position counts the batches that were
                handed out; or the indices of each batch, which may have none.
            crop: of `effnet_fast.training.data.decoding`; another one at each call, where wanted.
            epoch: where `order` is no sampler.

        Raises:
            UnreadableLimitError: names the first unreadable images.
            WorkerError: reading failed for another reason; names the image.
            RuntimeError: another iteration over this loader has not ended.
        """
        if self._busy:
            raise RuntimeError("a Loader reads one epoch at a time: end the other iteration first")
        self._busy = True
        try:
            sampler = order if isinstance(order, EpochSampler) else None
            draw = Draw(self.seed, epoch if sampler is None else sampler.epoch)
            position = 0 if sampler is None else sampler.position
            read = self._in_process if self.workers == 0 else self._in_workers
            lists = ([int(index) for index in part] for part in order)
            for indices, pixels, labels, reasons in read(lists, crop, draw):
                total = len(indices)
                if sampler is not None:
                    total = sampler.total(position)
                    position += 1
                    sampler.position = position
                yield self._batch(indices, pixels, labels, reasons, total)
        finally:
            if self._pool is not None and self._pool.flying:
                self._pool.drain()
            self._busy = False

    def _batch(
        self,
        indices: Sequence[int],
        pixels: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any],
        reasons: dict[int, str],
        total: int,
    ) -> Batch:
        """Copies a batch out of the group's memory and counts what is unreadable."""
        problems = tuple(
            Problem(indices[k], self.images.paths[indices[k]], reasons[k]) for k in sorted(reasons)
        )
        for problem in problems:
            self.unreadable.setdefault(problem.index, problem)
        found = ((problem.path, problem.reason) for problem in self.unreadable.values())
        check_limit(len(self.unreadable), self.unreadable_limit, found)
        good = [k for k in range(len(indices)) if k not in reasons]
        source = torch.from_numpy(pixels)
        images = torch.empty((len(good), *source.shape[1:]), dtype=torch.uint8, pin_memory=self.pin)
        if len(good) == len(indices):
            images.copy_(source)
        else:
            images.copy_(source[good])
        return Batch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(labels[good].astype(np.int64)),
            torch.tensor([indices[k] for k in good], dtype=torch.int64),
            problems,
            total,
        )

    def _items(self, indices: Iterable[int]) -> list[Item]:
        images = self.images
        return [Item(i, images.source(i), images.label(i), images.paths[i]) for i in indices]

    def _in_process(self, order: Iterator[Sequence[int]], crop: Any, draw: Draw) -> Iterator[Any]:
        """Each batch's indices, pixels [N,R,R,3], labels [N] and reasons by place."""
        for indices in order:
            pixels = np.zeros((len(indices), crop.size, crop.size, 3), np.uint8)
            labels = np.zeros(len(indices), np.int64)
            reasons = {}
            for place, item in enumerate(self._items(indices)):
                try:
                    x, labels[place] = groups.read(self._reader, item, crop, draw)
                    pixels[place] = x.permute(1, 2, 0).numpy()
                except UnreadableImageError as error:
                    reasons[place] = error.reason
            yield indices, pixels, labels, reasons

    def _in_workers(self, order: Iterator[Sequence[int]], crop: Any, draw: Draw) -> Iterator[Any]:
        """The same, group by group."""
        if self._pool is None:
            self._pool = groups.Pool(self._reader, self.workers)
        pool = self._pool
        room = min(GROUP_BYTES // (3 * crop.size**2), MOST)
        room = max(room, LEAST_PER_WORKER * self.workers)
        started: list[list[Sequence[int]]] = []  # groups in flight, batch by batch

        def start() -> None:
            parts: list[Sequence[int]] = []
            count = 0
            for indices in order:
                parts.append(indices)
                count += len(indices)
                if count + len(indices) > room:
                    break
            if parts:
                pool.start(self._items(itertools.chain(*parts)), crop, draw)
                started.append(parts)

        try:
            start()
            while started:
                group, reasons = pool.wait()
                parts = started.pop(0)
                if not self.in_turn:
                    start()
                first = 0
                for indices in parts:
                    last = first + len(indices)
                    assert (group.states[first:last] >= READ).all()
                    own = {k - first: reasons[k] for k in range(first, last) if k in reasons}
                    yield indices, group.pixels[first:last], group.labels[first:last], own
                    first = last
                if self.in_turn:
                    start()
        except WorkerError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers; a later iteration starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers() -> int:
    """One process per core that this process may use; torchrun's local processes share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
