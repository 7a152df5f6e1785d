"""Processes that decode images into memory they share with the one that trains.

A group of images is decoded at a time. Every worker takes the next image from a common counter, so
that all of them end within the time of one image. Workers are forked from a server without threads
(or spawned where that is missing), run on one thread, and end with the process that made them.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, reduction, util
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effnet_fast.training.data.decoding import Draw, UnreadableImageError

UNSET, READ, UNREADABLE = range(3)  # of an image in a group
BUFFERS = 2  # groups in flight: one that is decoded, one that is used
STOP = 1 << 62  # of a counter: no images are left
PATIENCE = 5.0  # seconds for a worker to end by itself
HINT = (
    "A script that reads images with workers keeps its code under `if __name__ == '__main__':`; "
    "workers=0 reads in this process"
)


class Item(NamedTuple):
    """An image to be read."""

    number: int  # its index in its list
    source: Any  # for the list's reader
    label: int
    name: str


class WorkerError(RuntimeError):
    """A worker failed. The message names the image; the worker's traceback is the cause."""


class _RemoteError(Exception):
    """A traceback of another process."""


class _Failure(NamedTuple):
    message: str
    trace: str


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

        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if "forkserver" in methods:
            context.set_forkserver_preload([__name__, "PIL.Image"])
        try:
            pickled = pickle.dumps(reader)
        except Exception as error:  # a dataset of the user's own may raise anything
            raise TypeError(
                f"the dataset cannot be sent to worker processes ({error}); workers=0 reads in "
                "this process"
            ) from error
        self._counters = [context.Value("q", STOP) for _ in range(BUFFERS)]
        self._groups: list[Group | None] = [None] * BUFFERS
        self._processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._next = 0  # number of the next group
        self.flying: list[int] = []  # groups that were started and not awaited
        for number in range(workers):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, self._counters, pickled, Image.MAX_IMAGE_PIXELS),
                name=f"effnet-fast-images-{number}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        # Workers ignore SIGTERM, by which an interpreter that exits ends its daemons: it would wait
        # for them for ever. This comes first.
        self._end = util.Finalize(
            self, _end, (self._pipes, self._processes, self._counters), exitpriority=100
        )

    def start(self, items: Sequence[Item], crop: Any, draw: Draw) -> None:
        """Has a group decoded; at most BUFFERS groups may be in flight."""
        buffer = self._next % BUFFERS
        group = self._groups[buffer]
        fresh = group is None or group.size != crop.size or group.count < len(items)
        if fresh:
            if group is not None:
                group.close()
            group = self._groups[buffer] = Group(len(items), crop.size)
        assert group is not None
        group.states[:] = UNSET
        self._counters[buffer].value = 0
        shape = (group.count, group.size) if fresh else None
        message = pickle.dumps((buffer, shape, list(items), crop, draw))
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):  # the worker has ended, and `wait` says why
                pipe.send_bytes(message)
                if fresh:
                    reduction.send_handle(pipe, group.descriptor, process.pid)
        self.flying.append(buffer)
        self._next += 1

    def wait(self) -> tuple[Group, dict[int, str]]:
        """The oldest group in flight, and why images in it are unreadable, by their place.

        Raises:
            WorkerError: a worker failed or ended.
        """
        buffer = self.flying[0]
        reasons: dict[int, str] = {}
        waiting = dict(zip(self._pipes, self._processes, strict=True))
        while waiting:
            ready = connection.wait([*waiting, *(p.sentinel for p in waiting.values())])
            for pipe, process in [*waiting.items()]:
                if pipe in ready or process.sentinel in ready:
                    reasons.update(_answer(pipe, process))
                    del waiting[pipe]
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
        self._end()
        for group in self._groups:
            if group is not None:
                group.close()
        self._groups = [None] * BUFFERS
        self.flying = []


def _end(
    pipes: Sequence[connection.Connection],
    processes: Sequence[BaseProcess],
    counters: Sequence[Any],
) -> None:
    """Ends workers; also when the pool is forgotten, or the interpreter exits."""
    for counter in counters:
        counter.get_obj().value = STOP  # without the lock: a killed worker may hold it
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _answer(pipe: connection.Connection, process: BaseProcess) -> dict[int, str]:
    """Why images of a group are unreadable, by their place, from one worker."""
    try:
        answer = pipe.recv()
    except (EOFError, OSError):
        process.join(PATIENCE)
        code = process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name} (is the memory full?)"
        raise WorkerError(f"a worker that reads images {how}. {HINT}") from None
    if isinstance(answer, _Failure):
        raise WorkerError(answer.message) from _RemoteError(answer.trace)
    reasons: dict[int, str] = answer
    return reasons


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


def _work(
    pipe: connection.Connection, counters: Sequence[Any], pickled: bytes, most_pixels: int | None
) -> None:
    """The life of a worker: group after group until the pipe closes."""
    # Ctrl-C and SIGTERM reach the whole process group; the process that trains decides what ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = most_pixels
    groups: list[Group | None] = [None] * BUFFERS
    try:
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            try:
                reader = pickle.loads(pickled)
            except Exception as error:  # of the user's own dataset, as above
                reader = None
                failure = _Failure(
                    f"the dataset cannot be made anew in a worker: {error!r}. {HINT}",
                    traceback.format_exc(),
                )
            while True:
                buffer, shape, items, crop, draw = pickle.loads(pipe.recv_bytes())
                if shape is not None:
                    old = groups[buffer]
                    if old is not None:
                        old.close()
                    count, size = shape
                    groups[buffer] = Group(count, size, reduction.recv_handle(pipe))
                group = groups[buffer]
                assert group is not None
                if reader is None:
                    pipe.send(failure)
                else:
                    pipe.send(_fill(group, items, reader, crop, draw, counters[buffer]))
    finally:
        pipe.close()


def _fill(
    group: Group, items: Sequence[Item], reader: Any, crop: Any, draw: Draw, counter: Any
) -> dict[int, str] | _Failure:
    """Reads images of the group until none is left; returns reasons, or what failed."""
    reasons: dict[int, str] = {}
    while True:
        with counter.get_lock():
            place = counter.value
            counter.value = place + 1
        if place >= len(items):
            return reasons
        try:
            pixels, group.labels[place] = read(reader, items[place], crop, draw)
        except UnreadableImageError as error:
            reasons[place] = error.reason
            group.states[place] = UNREADABLE
        except Exception as error:  # goes to the process that waits, which raises it
            counter.value = STOP
            message = str(error) if isinstance(error, WorkerError) else None
            return _Failure(message or f"{items[place].name}: {error!r}", traceback.format_exc())
        else:
            group.pixels[place] = pixels.permute(1, 2, 0).numpy()
            group.states[place] = READ
