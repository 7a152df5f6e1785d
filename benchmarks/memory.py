"""Peak memory of a call: of the GPU's allocator, or of the process's resident set on a CPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # sets the peak of the resident set back to its size (man 5 proc)


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs beyond what stood before it; None where that cannot be told.

    On a CPU it is the growth of the resident set, in pages of 4 KiB: memory which the allocator had
    kept from earlier calls is handed back to the system first, and the call has a thread of its
    own: workspaces that belong to a thread, this package's too, are taken anew and count.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text(RESET_PEAK)
    except (OSError, AttributeError):  # no /proc, not ours to write, or no glibc
        return None
    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(torch.get_num_threads).result()  # starts the thread and its pool's settings
        before = _status("VmRSS")
        fresh.submit(function).result()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A line of /proc/self/status that counts kB, in bytes."""
    for line in STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{STATUS} has no {name}")
