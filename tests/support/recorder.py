"""A stand-in for a device that captures graphs: `cuda_graphs.Recorder` on CPU tensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class FakeRecorder:
    """Writes down what is asked of it; a graph runs its function again into the same results.

    As on a device, capturing computes nothing: the results are NaN until the first replay.

    Attributes:
        log: the calls in order.
        captures: whether the caller is capturing a graph of its own.
        overlaps: how often a call began before the last one was marked as done.
        failure: raised by `record` where it is set.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lent: list[Tensor] = []
        self.captures = False
        self.overlaps = 0
        self.failure: Exception | None = None
        self._busy = threading.Lock()

    def count(self, name: str) -> int:
        return self.log.count(name)

    def guard(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def capturing(self) -> bool:
        return self.captures

    def stream(self) -> int:
        return 0

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], Any]:
        self.log.append("record")
        if self.failure:
            raise self.failure
        results = function()
        with torch.inference_mode(False):
            results = [torch.full_like(result, float("nan")) for result in results]

        def replay() -> None:
            self.log.append("replay")
            for result, value in zip(results, function(), strict=True):
                result.copy_(value)

        return replay, results

    def wait(self) -> None:
        self.log.append("wait")
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1

    def mark(self) -> None:
        self.log.append("mark")
        if self._busy.locked():
            self._busy.release()

    def finish(self) -> None:
        self.log.append("finish")

    def lend(self, tensors: Sequence[Tensor]) -> None:
        self.lent += tensors
