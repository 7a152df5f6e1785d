"""The order in which "auto" tries the backends, by device and op, and where each row comes from.

The first that can run a call takes it; where none can, the reference does.
"""

from __future__ import annotations

from typing import NamedTuple


class Preference(NamedTuple):
    """One row.

    Attributes:
        device: type of x's device.
        op: the op's name; "*" for every op without a row of its own.
        order: backends, the preferred one first.
        source: "heuristic", or "measured(DEVICE, COMMIT)".
    """

    device: str
    op: str
    order: tuple[str, ...]
    source: str


PREFERENCES = (
    Preference("cpu", "*", ("cpu",), "measured(2 x86-64 cores, docs/benchmarks.md)"),
    Preference("cuda", "pointwise_bn_act", ("triton", "cuda"), "heuristic"),
    Preference("cuda", "stem_conv_bn_silu", ("triton",), "heuristic"),
    Preference("cuda", "*", ("cuda", "triton"), "heuristic"),
)


def order(device: str, op: str) -> tuple[str, ...]:
    """The backends to try for an op on tensors of a device type; none for other devices."""
    for row in PREFERENCES:
        if row.device == device and row.op in (op, "*"):
            return row.order
    return ()
