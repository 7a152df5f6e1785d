"""Worker processes of one thread each, which call a function with one task after the other.

They end with the process that made them, also where SIGKILL ends it: their pipe then has no other
end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, reduction, util
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks that a worker holds: the next one waits there while it computes
WINDOW = 8  # tasks per worker that may be ahead of the oldest one that is unanswered
PATIENCE = 5.0  # seconds for a worker whose pipe has ended to have an exit code
HINT = (
    "A script that reads images with workers keeps its code under `if __name__ == '__main__':`; "
    "workers=0 reads in this process, and needs the least memory"
)


class WorkerError(RuntimeError):
    """A worker failed. Where it was an error of its work, the worker's traceback is the cause."""


class _RemoteError(Exception):
    """A traceback of another process."""


def context_of(forks: bool) -> Any:
    """How processes are started: from this one, from a server without threads, or spawned."""
    methods = multiprocessing.get_all_start_methods()
    if forks and sys.platform.startswith("linux"):
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


class Workers(Generic[Task, Result]):
    """Processes that each call `work`.

    Args:
        work: makes a result of a task; neither may change what it finds in memory for others.
        count: number of processes; 0 calls `work` in this one.
        forks: whether they are forked from this process (on Linux), so that they share its memory,
            that of packed weights for one, and start at once; else `work` is pickled.
        descriptors: files that a forked child closes, such as those whose lock ends with the
            parent.
    """

    def __init__(
        self,
        work: Callable[..., Result],
        count: int,
        *,
        forks: bool = False,
        descriptors: Sequence[int] = (),
    ) -> None:
        self._work = work
        self._processes: dict[connection.Connection, BaseProcess] = {}
        context = context_of(forks)
        forks = context.get_start_method() == "fork"
        for number in range(count):
            ours, theirs = context.Pipe()
            inherited = ([*self._processes, ours], tuple(descriptors)) if forks else ([], ())
            process = context.Process(
                target=_serve,
                args=(work, theirs, *inherited),
                name=f"effnet-fast-worker-{number}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes[ours] = process
        # Workers ignore SIGTERM, by which an interpreter that exits ends its daemons: it would wait
        # for them for ever. This comes first.
        self._end = util.Finalize(self, _end, (self._processes,), exitpriority=100)

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The results, in the order of the tasks, which are taken as they are needed.

        Raises:
            WorkerError: a worker ended, with the signal or status that ended it.
            Exception: what `work` raised.
        """
        if not self._processes:
            yield from map(self._work, tasks)
            return
        source = iter(tasks)
        waiting: dict[connection.Connection, deque[int]] = {p: deque() for p in self._processes}
        results: dict[int, Result] = {}
        given = taken = 0
        more = True
        while True:
            while more and given - taken < WINDOW * len(waiting):
                pipe = min(waiting, key=lambda p: len(waiting[p]))
                if len(waiting[pipe]) == AHEAD:
                    break
                try:
                    task = next(source)
                except StopIteration:
                    more = False
                    break
                self._send(pipe, task)
                waiting[pipe].append(given)
                given += 1
            while taken in results:
                yield results.pop(taken)
                taken += 1
            busy: list[Any] = [pipe for pipe in waiting if waiting[pipe]]
            if not busy and not more:
                return
            ready: list[Any] = connection.wait(busy)
            for pipe in ready:
                results[waiting[pipe].popleft()] = self._receive(pipe)

    def tell(self, task: Task, descriptor: int | None = None) -> None:
        """Gives each worker the same task, and a file as the second argument of `work`."""
        for pipe in self._processes:
            with contextlib.suppress(WorkerError):  # `answers` says why
                self._send(pipe, task, descriptor)

    def answers(self) -> Iterator[Result]:
        """What each worker answers to the oldest task that was told, as they come.

        Raises:
            WorkerError, Exception: as `map`.
        """
        waiting = dict(self._processes)
        while waiting:
            ready = connection.wait([*waiting, *(p.sentinel for p in waiting.values())])
            for pipe, process in [*waiting.items()]:
                if pipe in ready or process.sentinel in ready:
                    del waiting[pipe]
                    yield self._receive(pipe)

    def _send(self, pipe: connection.Connection, task: Task, descriptor: int | None = None) -> None:
        try:
            pipe.send((task, descriptor is not None))
            if descriptor is not None:
                reduction.send_handle(pipe, descriptor, self._processes[pipe].pid)
        except OSError as error:
            raise self._ended(pipe) from error

    def _receive(self, pipe: connection.Connection) -> Result:
        try:
            result, error, trace = pipe.recv()
        except (EOFError, OSError) as ended:
            raise self._ended(pipe) from ended
        if error is not None:
            raise error from _RemoteError(trace)
        found: Result = result
        return found

    def _ended(self, pipe: connection.Connection) -> WorkerError:
        process = self._processes[pipe]
        process.join(PATIENCE)
        code = process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name} (is the memory full?)"
        return WorkerError(f"a worker process {how}. {HINT}")

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._end()

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(processes: dict[connection.Connection, BaseProcess]) -> None:
    """Ends workers; also when they are forgotten, or the interpreter exits."""
    for pipe, process in processes.items():
        pipe.close()
        process.kill()
    for process in processes.values():
        process.join()
    processes.clear()


def _serve(
    work: Callable[..., Any],
    pipe: connection.Connection,
    inherited: Sequence[connection.Connection],
    descriptors: Sequence[int],
) -> None:
    """The life of a worker: task after task until the pipe ends."""
    for other in inherited:  # else no end of a pipe would ever be the last
        other.close()
    for descriptor in descriptors:
        os.close(descriptor)
    # Ctrl-C and SIGTERM reach the whole process group; the process that has workers ends them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    tasks: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    # A thread reads, so that the parent's send and this worker's never wait for each other.
    threading.Thread(target=_read, args=(pipe, tasks), daemon=True).start()
    while True:
        arguments = tasks.get()
        try:
            reply: tuple[Any, ...] = (work(*arguments), None, None)
        except Exception as error:  # whatever it is, the caller raises it
            reply = (None, error, traceback.format_exc())
        try:
            pipe.send(reply)
        except OSError:
            return


def _read(pipe: connection.Connection, tasks: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            task, has_file = pipe.recv()
            tasks.put((task, reduction.recv_handle(pipe)) if has_file else (task,))
    os._exit(0)
