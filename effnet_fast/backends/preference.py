"""The order in which "auto" tries the backends, by device and op, and where each row comes from.

The first that can run a call takes it; where none can, the reference does.
"""

from __future__ import annotations

from typing import NamedTuple


class Preference(NamedTuple):
    """One row."""

    device: str  # type of x's device
    op: str  # the op's name; "*" for every op without a row of its own
    order: tuple[str, ...]  # the preferred backend first; none to leave the call to the reference
    source: str  # "heuristic", or "measured(DEVICE, COMMIT)"
    channels: int = 0  # of x; the row holds for these and more
    reason: str = ""  # why the reference runs the call, where `order` is empty


PREFERENCES = (
    Preference(
        "cpu",
        "stem_conv_bn_silu",
        (),
        "measured(2 x86-64 cores, docs/performance.md)",
        channels=64,
        reason="PyTorch's dense convolution is quicker for 64 input channels and more",
    ),
    Preference("cpu", "*", ("cpu",), "measured(2 x86-64 cores, docs/benchmarks.md)"),
    Preference("cuda", "pointwise_bn_act", ("triton", "cuda"), "heuristic"),
    Preference("cuda", "stem_conv_bn_silu", ("triton",), "heuristic"),
    Preference("cuda", "*", ("cuda", "triton"), "heuristic"),
)


def preferred(device: str, op: str, channels: int = 0) -> Preference:
    """The row for an op on tensors of a device type and so many channels."""
    for row in PREFERENCES:
        if row.device == device and row.op in (op, "*") and channels >= row.channels:
            return row
    return Preference(device, op, (), "", reason=f"there are no kernels for {device}")


def order(device: str, op: str, channels: int = 0) -> tuple[str, ...]:
    """The backends to try; none for devices without kernels."""
    return preferred(device, op, channels).order
