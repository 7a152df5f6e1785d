"""Groups of images that workers decode into memory they share with the process that uses them.

Every worker takes the next image of a group from a common counter, so that all of them end within
the time of one image.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from effnet_fast.training.data.decoding import Draw, UnreadableImageError
from effnet_fast.training.data.workers import HINT, WorkerError, Workers, context_of

UNSET, READ, UNREADABLE = range(3)  # of an image in a group
BUFFERS = 2  # groups in flight: one that is decoded, one that is used
STOP = 1 << 62  # of a counter: no images are left


class Item(NamedTuple):
    """An image to be read."""

    number: int  # its index in its list
    source: Any  # for the list's reader
    label: int
    name: str


class Group:
    """Memory for the images of a group: pixels [n,R,R,3], labels [n], states [n].

    The memory has no name: it is gone when the last process that has it open ends.
    """

    def __init__(self, count: int, size: int, descriptor: int | None = None) -> None:
        pixels = count * size * size * 3
        self.count, self.size = count, size
        self.descriptor = _memory(count * 9 + pixels) if descriptor is None else descriptor
        self.memory = mmap.mmap(self.descriptor, count * 9 + pixels)
        self.labels = np.frombuffer(self.memory, np.int64, count)
        self.states = np.frombuffer(self.memory, np.uint8, count, count * 8)
        self.pixels = np.frombuffer(self.memory, np.uint8, pixels, count * 9).reshape(
            count, size, size, 3
        )

    def close(self) -> None:
        """Gives the memory back."""
        del self.labels, self.states, self.pixels
        with contextlib.suppress(BufferError):  # a caller's error may hold a view; it ends later
            self.memory.close()
        os.close(self.descriptor)


def _memory(size: int) -> int:
    """A descriptor of anonymous memory; of a file without a name where there is none."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("effnet-fast-images")
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    os.truncate(descriptor, max(size, 1))
    return descriptor


class Pool:
    """Workers that read groups of images.

    Args:
        reader: picklable; called with an item's source and draw, returns what a crop takes and a
            label or None.
        workers: number of processes.
    """

    def __init__(self, reader: Callable[..., Any], workers: int) -> None:
        from PIL import Image

        try:
            pickled = pickle.dumps(reader)
        except Exception as error:  # a dataset of the user's own may raise anything
            raise TypeError(
                f"the dataset cannot be sent to worker processes ({error}); workers=0 reads in "
                "this process"
            ) from error
        context = context_of(forks=False)
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__, "PIL.Image"])
        self._counters = [context.Value("q", STOP) for _ in range(BUFFERS)]
        filling = _Filling(pickled, self._counters, Image.MAX_IMAGE_PIXELS)
        self._workers: Workers[bytes, dict[int, str]] = Workers(filling, workers)
        self._groups: list[Group | None] = [None] * BUFFERS
        self._next = 0  # number of the next group
        self.flying: list[int] = []  # groups that were started and not awaited

    def start(self, items: Sequence[Item], crop: Any, draw: Draw) -> None:
        """Has a group decoded; at most BUFFERS groups may be in flight."""
        buffer = self._next % BUFFERS
        group = self._groups[buffer]
        fresh = group is None or group.size != crop.size or group.count < len(items)
        if fresh:
            if group is not None:
                group.close()
            group = self._groups[buffer] = Group(max(1, len(items)), crop.size)
        assert group is not None
        group.states[:] = UNSET
        self._counters[buffer].value = 0
        shape = (group.count, group.size) if fresh else None
        message = pickle.dumps((buffer, shape, list(items), crop, draw))  # once for all workers
        self._workers.tell(message, group.descriptor if fresh else None)
        self.flying.append(buffer)
        self._next += 1

    def wait(self) -> tuple[Group, dict[int, str]]:
        """The oldest group in flight, and why images in it are unreadable, by their place.

        Raises:
            WorkerError: a worker failed or ended.
        """
        buffer = self.flying[0]
        reasons: dict[int, str] = {}
        for answer in self._workers.answers():
            reasons.update(answer)
        self.flying.pop(0)
        group = self._groups[buffer]
        assert group is not None
        return group, reasons

    def drain(self) -> None:
        """Has the workers leave what they have not begun, and waits for them."""
        for buffer in self.flying:
            self._counters[buffer].value = STOP
        while self.flying:
            self.wait()

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
        for group in self._groups:
            if group is not None:
                group.close()
        self._groups = [None] * BUFFERS
        self.flying = []


def read(reader: Callable[..., Any], item: Item, crop: Any, draw: Draw) -> tuple[Tensor, int]:
    """An image's pixels, uint8 [3,R,R], and its label.

    Raises:
        UnreadableImageError: it cannot be read.
        WorkerError: anything else went wrong; the message names the image.
    """
    draw = draw._replace(image=item.number)
    try:
        source, label = reader(item.source, draw)
        pixels = crop(source, draw, name=item.name)
        return pixels, item.label if label is None else int(label)
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # datasets and crops of the user's own may raise anything
        raise WorkerError(f"{item.name}: {type(error).__name__}: {error}") from error


class _Filling:
    """Reads images of a group until none is left: the work of a worker."""

    def __init__(self, pickled: bytes, counters: Sequence[Any], most_pixels: int | None) -> None:
        self._pickled, self._counters, self._most_pixels = pickled, counters, most_pixels
        self._reader: Any = None
        self._groups: list[Group | None] = [None] * BUFFERS

    def __call__(self, message: bytes, descriptor: int | None = None) -> dict[int, str]:
        """Why images of the group are unreadable, by their place.

        Args:
            message: the group's buffer, its shape where it is a new one, images, crop and draw.
            descriptor: of the memory of a new one.

        Raises:
            WorkerError: reading failed for another reason.
        """
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = self._most_pixels
        buffer, shape, items, crop, draw = pickle.loads(message)
        if descriptor is not None:
            old = self._groups[buffer]
            if old is not None:
                old.close()
            count, size = shape
            self._groups[buffer] = Group(count, size, descriptor)
        group = self._groups[buffer]
        assert group is not None
        if self._reader is None:
            try:
                self._reader = pickle.loads(self._pickled)
            except Exception as error:  # of the user's own dataset
                raise WorkerError(
                    f"the dataset cannot be made anew in a worker: {error!r}. {HINT}"
                ) from error
        return self._fill(group, items, crop, draw, self._counters[buffer])

    def _fill(
        self, group: Group, items: Sequence[Item], crop: Any, draw: Draw, counter: Any
    ) -> dict[int, str]:
        reasons: dict[int, str] = {}
        while True:
            with counter.get_lock():
                place = counter.value
                counter.value = place + 1
            if place >= len(items):
                return reasons
            try:
                pixels, group.labels[place] = read(self._reader, items[place], crop, draw)
            except UnreadableImageError as error:
                reasons[place] = error.reason
                group.states[place] = UNREADABLE
            except Exception as error:  # goes to the process that waits, which raises it
                counter.value = STOP
                if isinstance(error, WorkerError):
                    raise
                raise WorkerError(f"{items[place].name}: {error!r}") from error
            else:
                group.pixels[place] = pixels.permute(1, 2, 0).numpy()
                group.states[place] = READ
