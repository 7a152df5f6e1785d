"""Tile sizes, warps and stages of every kernel: a table, never tuned at import or first use.

`tuning.json` is a list of rows in order of preference. A row holds for its kernel where the device
is the named one (any where null) and every size in "where" lies within its bounds, ends included.
Its "source" is "heuristic", or "measured(DEVICE, COMMIT)" as `python -m benchmarks.tune` writes it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tuning.json")
Row = dict[str, Any]


@functools.cache
def rows() -> tuple[Row, ...]:
    """The table."""
    return tuple(json.loads(FILE.read_text()))


@functools.cache
def device_name(index: int | None) -> str:
    """What `torch.cuda` calls a device."""
    return torch.cuda.get_device_name(index)


@functools.cache
def _find(kernel: str, device: str | None, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
    given = dict(sizes)
    for row in rows():
        bounds = row["where"].items()
        if (
            row["kernel"] == kernel
            and row["device"] in (None, device)
            and all(low <= given[name] <= high for name, (low, high) in bounds)
        ):
            return row["config"]
    raise LookupError(f"no row for {kernel} with {given} in {FILE}")


def config(kernel: str, x: torch.Tensor, /, **sizes: int) -> dict[str, int]:
    """The configuration of a kernel.

    Args:
        kernel: its name in the table.
        x: whose device and element size count.
        sizes: what the table's rows ask for: m, n and k of a product, c, h, w, kernel ...
    """
    device = device_name(x.device.index) if x.device.type == "cuda" else None
    sizes["bytes"] = x.element_size()
    return _find(kernel, device, tuple(sorted(sizes.items())))
