"""Which tier a test is in. The rule for every op:

| shapes       | `pytest`                        | `make test` adds  | `make test-all` adds |
|--------------|---------------------------------|-------------------|----------------------|
| made by hand | fp32 on the best set            | every backend and |                      |
|              |                                 | dtype             |                      |
| B0's         |                                 | fp32 and bf16 on  | all others           |
|              |                                 | the best set      |                      |
| B7's         |                                 |                   | all                  |

The best set is the newest instruction set that this machine has. Of a function with many cases
plain `pytest` takes two and `make test` eight, drawn by their names, or all where a backend is one
of the parameters.
"""

from __future__ import annotations

import collections
import zlib
from collections.abc import Iterable
from typing import Any

import pytest

from effnet_fast.backends import can_run, native
from effnet_fast.models import VARIANTS

# Those of this build. AMX is no set of its own: the kernels of AVX-512 with bf16, told to use it.
INSTRUCTION_SETS = tuple(f"cpu:{name}" for name in native.load().isas() if name != "amx")
# Of ops that multiply bf16 as it is: by vdpbf16ps, and by the tile unit with the same objects.
PRODUCT_SETS = (*INSTRUCTION_SETS, "cpu:amx")
AVAILABLE = [name for name in INSTRUCTION_SETS if can_run(name, "dwconv_bn_silu") is None]
BEST = ("cpu", *AVAILABLE[-1:], *(f"cpu:{native.load().best_isa()}" for _ in AVAILABLE[:1]))
NETWORK_DTYPES = ("float32", "bfloat16")
QUICK_CASES, TESTED_CASES = 2, 8  # of one function
EXHAUSTIVE = (pytest.mark.exhaustive,)
SLOW = (pytest.mark.slow,)


def network_of(case: Any) -> str | None:
    """The network whose shape a case is, "b0" for one named "b0_c32_112_k3_s1"."""
    name = str(case.name).partition("_")[0]
    return name if name in VARIANTS else None


def marks(backend: str, dtypes: Any, case: Any = None) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a test.

    Args:
        backend: "cpu" and "cpu:avx2" and so on, "simt" or "cuda".
        dtypes: whose name is "float32", or "bfloat16_with_float32" where parameters differ.
        case: its shapes, None where they do not matter.
    """
    dtype = str(dtypes).removeprefix("torch.")
    network = None if case is None else network_of(case)
    if network is None:
        return () if backend in BEST and dtype == "float32" else SLOW
    tested = network == "b0" and backend in BEST and dtype in NETWORK_DTYPES
    return SLOW if tested else EXHAUSTIVE


def some(values: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Values as pytest's parameters; those that are not among `kept` are for `make test-all`."""
    kept = list(kept)
    return [
        pytest.param(value, id=str(value), marks=() if value in kept else EXHAUSTIVE)
        for value in values
    ]


def networks(sizes: Iterable[str]) -> list[Any]:
    """Sizes of networks as pytest's parameters: B0, the others for `make test-all`."""
    tier = {"b0": ()}
    return [pytest.param(size, marks=tier.get(size, EXHAUSTIVE)) for size in sizes]


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Moves what a function has in cases beyond QUICK_CASES and TESTED_CASES to the next tier."""
    functions: dict[tuple[Any, str], list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in ("exhaustive", "gpu")):
            functions[item.path, item.nodeid.partition("[")[0]].append(item)
    for cases in functions.values():
        params = getattr(getattr(cases[0], "callspec", None), "params", {})
        if params.keys().isdisjoint(("backend", "isa")):  # those have come through `marks`
            cases = _mark_beyond(TESTED_CASES, cases, pytest.mark.exhaustive)
        quick = [item for item in cases if not item.get_closest_marker("slow")]
        _mark_beyond(QUICK_CASES, quick, pytest.mark.slow)


def _mark_beyond(
    count: int, cases: list[pytest.Item], mark: pytest.MarkDecorator
) -> list[pytest.Item]:
    """Marks all cases but `count`, which it returns.

    They are drawn by a hash of their names: a fixed step would meet one value of a parameter alone.
    """
    drawn = sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))
    for item in drawn[count:]:
        item.add_marker(mark)
    return drawn[:count]
