"""A GPU's own time of a call: between two events, with the L2 cache flushed before."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**28  # more than any L2 cache


def call_for(function: Callable[[], object], seconds: float, at_least: int) -> list[float]:
    """Device times of calls in ms, each after the L2 cache was flushed."""
    flush = torch.empty(FLUSH_BYTES // 4, device="cuda")
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(events) < at_least:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        flush.zero_()
        pair[0].record()
        function()
        pair[1].record()
        events.append(pair)
        if len(events) % 16 == 0:  # keeps the host at most this many calls ahead
            pair[1].synchronize()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]
