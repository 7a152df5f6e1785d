"""CUDA graphs of a function of images, one per shape, kept within a bound.

A replayed graph costs one launch instead of one per kernel. Its price is memory at fixed addresses:
images are copied into it and results out of it, and since all graphs of one cache share a memory
pool, they run one after another, whichever streams and threads call.

Source: "Getting started with CUDA graphs", https://developer.nvidia.com/blog/cuda-graphs/; sharing
of pools: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = 8  # graphs
PATIENCE = 8  # calls of a new shape since the least recently used graph was of use
WAITING = 64  # shapes without a graph whose calls are counted
Function = Callable[[Tensor], list[Tensor]]
Key = tuple[object, ...]

_captures = threading.Lock()  # of the process: what one clears, another may be about to use


class CudaRecorder:
    """Captures for `Graphs`, on a stream of its own, into a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None
        self._reached: Any = None

    def guard(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""
        return torch.cuda.device(self.device)

    def capturing(self) -> bool:
        """Whether the caller captures a graph of its own."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> int:
        """Which the current stream is."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], Any]:
        """What replays the function's launches on the current stream, and its results."""
        with _captures, self.guard():
            if self._stream is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(self.device)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate and launch meanwhile: their calls are none of the graph's.
            capture = torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            )
            _clear_workspaces()  # so that the product's lies in the pool
            current = torch.cuda.current_stream(self.device)
            try:
                with torch.cuda.stream(current), capture:  # a failed capture leaves its own behind
                    results = function()
            finally:
                _clear_workspaces()
        return graph.replay, results

    def wait(self) -> None:
        """Lets the current stream wait for what `mark` has seen last."""
        if self._reached is not None:
            torch.cuda.current_stream(self.device).wait_event(self._reached)

    def mark(self) -> None:
        """Marks the place that the current stream has reached."""
        if self._reached is None:
            self._reached = torch.cuda.Event()
        self._reached.record(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Waits until that place is passed."""
        if self._reached is not None:
            self._reached.synchronize()

    def lend(self, tensors: Sequence[Tensor]) -> None:
        """Keeps the tensors' memory from other use until the current stream is done with it."""
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(stream)


def _clear_workspaces() -> None:
    """Lets cuBLAS ask for its workspace anew, as Inductor's own graphs do."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


class _Graph(NamedTuple):
    """One captured shape: where its images go, what runs it, and where its results are."""

    images: Tensor
    replay: Callable[[], None]
    results: list[Tensor]


class Graphs:
    """The graphs of one function, and the calls through them.

    A shape is captured at its first call while there is room. Beyond that a new shape is launched
    plainly, and takes the place of the least recently used graph only once it has come PATIENCE
    times since that graph was of use: shapes in turn, one more than there is room for, would
    otherwise capture at every call.

    Args:
        function: from images [N,C,H,W] in `dtype`, channels_last, to results that depend on the
            images alone; it neither waits for the device nor reads values.
        dtype: of the images that it takes.
        recorder: of the device.
        limit: graphs that are kept, at least 1.
        settings: what else the launches depend on, as a key.
    """

    def __init__(
        self,
        function: Function,
        dtype: torch.dtype,
        recorder: CudaRecorder,
        limit: int = LIMIT,
        settings: Callable[[], Key] = tuple,
    ) -> None:
        self.limit = limit
        self._function, self._dtype = function, dtype
        self._recorder, self._settings = recorder, settings
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()  # the most recently used is last
        self._used: dict[Key, int] = {}  # the call that used a graph last
        self._waiting: OrderedDict[Key, deque[int]] = OrderedDict()  # a shape's last calls
        self._calls = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, x: Tensor, dtype: torch.dtype) -> list[Tensor] | None:
        """The function's results in `dtype`, the caller's own; None where it is to be launched.

        Args:
            x: images [N,C,H,W] of any floating dtype and strides, on the device.
            dtype: of the results.
        """
        recorder = self._recorder
        if recorder.capturing():
            return None
        key = (*x.shape, *self._settings())
        with self._lock:
            if self._closed:
                return None
            self._calls += 1
            graph = self._graphs.get(key)
            if graph is None:
                return self._capture(key, x, dtype) if self._admits(key) else None
            self._graphs.move_to_end(key)
            self._used[key] = self._calls
            recorder.wait()
            graph.images.copy_(x)
            graph.replay()
            results = [result.to(dtype, copy=True) for result in graph.results]
            recorder.lend([graph.images])
            recorder.mark()
            return results

    def _admits(self, key: Key) -> bool:
        """Whether a shape without a graph gets one now; counts its calls where there is no room."""
        if len(self._graphs) < self.limit:
            return True
        calls = self._waiting.setdefault(key, deque(maxlen=PATIENCE))
        self._waiting.move_to_end(key)
        calls.append(self._calls)
        oldest = next(iter(self._graphs))
        if len(calls) < PATIENCE or calls[0] < self._used[oldest]:
            if len(self._waiting) > WAITING:
                self._waiting.popitem(last=False)
            return False
        del self._waiting[key]
        self._recorder.finish()  # the graph may still be running
        del self._graphs[oldest], self._used[oldest]
        return True

    def _capture(self, key: Key, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The results by plain launches, which warm up, and the graph for the next call."""
        recorder = self._recorder
        with torch.inference_mode(False):  # outside of it nothing may write to what is made inside
            images = torch.empty(
                x.shape, dtype=self._dtype, device=x.device, memory_format=torch.channels_last
            )
        images.copy_(x)
        results = [result.to(dtype) for result in self._function(images)]
        replay, captured = recorder.record(lambda: self._function(images))
        recorder.lend([images])
        recorder.mark()
        self._graphs[key] = _Graph(images, replay, captured)
        self._used[key] = self._calls
        return results

    def close(self) -> None:
        """Frees the graphs once they have run; calls from now on give None."""
        with self._lock:
            self._closed = True
            self._recorder.finish()
            self._graphs.clear()
            self._used.clear()
            self._waiting.clear()


def recorder_of(device: torch.device) -> CudaRecorder | None:
    """What captures on a device; None where there are no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None
