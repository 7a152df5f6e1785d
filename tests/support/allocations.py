"""What a model allocates and saves for backward, measured on the CPU; poisoned allocations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from effnet_fast.ops import scratch


@contextlib.contextmanager
def poisoned(wanted: bool = True) -> Iterator[None]:
    """torch.empty and its kind give NaN, so that an element that is never written shows."""
    if not wanted:
        yield
        return
    scratch.release()  # what the last call wrote there would hide it
    # torch.use_deterministic_algorithms does the same after importing the compiler for seconds.
    torch._C._set_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that PyTorch's CPU allocator has handed out during a call, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward pass saves, without those of the model and of x."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)  # alive, so that no address is given out twice
    del y
    return sum(saved.values())


def standing_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def train_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward; the gradients stay."""
    model(x).float().logsumexp(1).mean().backward()
