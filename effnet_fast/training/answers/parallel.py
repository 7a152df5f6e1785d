"""Worker processes of one thread each, which answer tasks whose results come in order.

The parent's death ends them, also by SIGKILL: their pipe then has no other end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks that a worker holds: the next one waits there while it computes
WINDOW = 8  # tasks per worker that may be ahead of the oldest one that is unanswered


class Workers(Generic[Task, Result]):
    """Processes that each call `work` with one task after the other.

    On Linux they are forked, so that they share the memory of packed weights and start at once;
    elsewhere `work` is pickled.

    Args:
        work: makes a result of a task; neither may change what it finds in memory for others.
        count: number of processes; 0 calls `work` in this one.
        descriptors: files that a forked child closes, such as those whose lock ends with the
            parent.
    """

    def __init__(
        self, work: Callable[[Task], Result], count: int, descriptors: Sequence[int] = ()
    ) -> None:
        self._work = work
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        forks = sys.platform.startswith("linux")
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            inherited = ([*self._pipes, ours], tuple(descriptors)) if forks else ([], ())
            process = context.Process(target=_serve, args=(work, theirs, *inherited), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The results, in the order of the tasks, which are taken as they are needed.

        Raises:
            RuntimeError: a worker ended, with the signal or status that ended it.
            Exception: what `work` raised.
        """
        if not self._pipes:
            yield from map(self._work, tasks)
            return
        source = iter(tasks)
        waiting: dict[Any, deque[int]] = {pipe: deque() for pipe in self._pipes}
        results: dict[int, Result] = {}
        given = taken = 0
        more = True
        while True:
            while more and given - taken < WINDOW * len(self._pipes):
                pipe = min(self._pipes, key=lambda p: len(waiting[p]))
                if len(waiting[pipe]) == AHEAD:
                    break
                try:
                    task = next(source)
                except StopIteration:
                    more = False
                    break
                self._talk(pipe, "send", task)
                waiting[pipe].append(given)
                given += 1
            while taken in results:
                yield results.pop(taken)
                taken += 1
            busy = [pipe for pipe in self._pipes if waiting[pipe]]
            if not busy and not more:
                return
            for pipe in multiprocessing.connection.wait(busy):
                well, result = self._talk(pipe, "recv")
                if not well:
                    raise result
                results[waiting[pipe].popleft()] = result

    def _talk(self, pipe: Any, method: str, *content: Any) -> Any:
        try:
            return getattr(pipe, method)(*content)
        except (EOFError, OSError) as error:
            process = self._processes[self._pipes.index(pipe)]
            process.join(1)
            code = process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
            raise RuntimeError(
                f"a worker process ended with {how}; where memory is short, fewer --workers or a "
                "smaller --batch need less"
            ) from error

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._pipes, self._processes = [], []

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    work: Callable[[Any], Any], pipe: Any, inherited: list[Any], descriptors: tuple[int, ...]
) -> None:
    """The life of a worker."""
    for other in inherited:  # else no end of a pipe would ever be the last
        other.close()
    for descriptor in descriptors:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends its workers
    torch.set_num_threads(1)
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, so that the parent's send and this worker's never wait for each other.
    threading.Thread(target=_read, args=(pipe, tasks), daemon=True).start()
    while (task := tasks.get()) is not _END:
        try:
            reply: tuple[bool, Any] = (True, work(task))
        except Exception as error:  # whatever it is, the caller raises it
            reply = (False, error)
        try:
            pipe.send(reply)
        except OSError:
            return


_END = object()


def _read(pipe: Any, tasks: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv())
    tasks.put(_END)
