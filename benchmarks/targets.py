"""What is to be reached: on a CPU, the longest times of what has no peer; on an H200, as a section
of docs/benchmarks.md, what the CUDA kernels' bytes and instructions predict. Nothing is measured.

Source of the rates: 67 TFLOP/s of fp32 in NVIDIA's datasheet of the H200, two to a multiply-add;
4.3 TB/s of a copy is an assumption, 90% of the datasheet's 4.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from effnet_fast.models import VARIANTS
from effnet_fast.scaling import convolutions

COPY_RATE = 4.3e12  # bytes read and written a second
ISSUE_RATE = 33.5e12  # instructions of a lane a second
SIZE = 2  # bytes of an element, bf16
BATCH = 64
NETWORKS = ("b0", "b4", "b7")
UNMEASURED = "not measured"
# Of an element of y in the forward pass, of x in backward, by (K, stride): docs/performance.md
# says how they were counted. Backward at stride 2 was not: its bytes stand alone.
FORWARD = {(3, 1): 36, (5, 1): 56, (3, 2): 61, (5, 2): 87}
BACKWARD = {(3, 1): 73, (5, 1): 113, (3, 2): 0, (5, 2): 0}
# Of this package's medians on a CPU of two cores, by what and case of a contest.
LIMITS_MS = {
    ("import", "beyond_torch"): 150.0,
    ("scale", "command"): 2000.0,
    ("scale", "fit"): 1000.0,
    ("scale", "hundred_points"): 100.0,
}
TARGETS = (
    ("depthwise + BN + SiLU, forward: share of its floor", "80%"),
    ("the same, backward", "80%"),
    ("forward beside stock's convolution, BN and SiLU", "2x as fast"),
    ("backward beside stock's", "3x as fast"),
    ("forward beside cuDNN's convolution alone", "ahead"),
)


PREDICTION_ERROR = 0.1  # median, of the predicted times of networks that were not measured


class Block(NamedTuple):
    """An MBConv for BATCH images: elements of tensors, and how often the network has it.

    Attributes:
        x, y: of the depthwise convolution's input and output.
        out: of the block's output.
        weights: of squeeze-and-excitation's two layers.
        vectors: N * C.
    """

    kernel: int
    stride: int
    x: int
    y: int
    out: int
    weights: int
    vectors: int
    residual: bool
    repeats: int


def blocks(network: str) -> Iterator[Block]:
    """The blocks of a network at its own resolution."""
    rows = {}
    for conv in convolutions(VARIANTS[network]):
        if conv.kind in ("stem", "head", "classifier"):
            continue
        rows[conv.kind] = conv
        if conv.kind != "project":
            continue
        depthwise, expand = rows["depthwise"], rows.pop("expand", None)
        inner = depthwise.out_channels
        before = expand or depthwise
        given = expand.in_channels if expand else inner
        yield Block(
            *(depthwise.kernel, depthwise.stride),
            x=BATCH * inner * before.side**2,
            y=BATCH * depthwise.activations,
            out=BATCH * conv.activations,
            weights=2 * inner * rows["reduce"].out_channels,
            vectors=BATCH * inner,
            residual=depthwise.stride == 1 and given == conv.out_channels,
            repeats=conv.repeats,
        )


def _seconds(elements: int, instructions: int = 0) -> float:
    return max(SIZE * elements / COPY_RATE, instructions / ISSUE_RATE)


class Pass(NamedTuple):
    """A kernel of a block, and the seconds predicted for it."""

    name: str
    words: str
    seconds: Callable[[Block], float]


PASSES = (
    Pass(
        *("depthwise, forward", "x, y; instructions"),
        lambda b: _seconds(b.x + b.y, FORWARD[b.kernel, b.stride] * b.y),
    ),
    Pass(
        *("depthwise, backward", "e, z2, z1, f; instructions at stride 1"),
        lambda b: _seconds(2 * b.x + 2 * b.y, BACKWARD[b.kernel, b.stride] * b.x),
    ),
    Pass("BN's sums, backward", "grad_y, z", lambda b: _seconds(2 * b.y)),
    Pass("squeeze", "z2", lambda b: _seconds(b.y)),
    Pass(
        *("excite", "both weights, pooled and gate in fp32"),
        lambda b: _seconds(b.weights + 2 * 2 * b.vectors),
    ),
    Pass("gate", "x, y", lambda b: _seconds(2 * b.y)),
    Pass("finish", "z3, y, x where added", lambda b: _seconds((2 + b.residual) * b.out)),
)


def predicted(network: str, one: Pass) -> float:
    """Seconds of a pass in all blocks of a network, BATCH images in bf16."""
    return sum(b.repeats * one.seconds(b) for b in blocks(network))


def section(table: Callable[..., str]) -> str:
    """The section in Markdown, by the report's `table`."""
    head = [f"{name.upper()}, ms" for name in NETWORKS]
    rows = [
        [
            *(one.name, one.words),
            *(f"{predicted(name, one) * 1e3:.2g}" for name in NETWORKS),
            UNMEASURED,
        ]
        for one in PASSES
    ]
    words = (
        f"Predictions for all blocks of a network at its own resolution, batch {BATCH}, bf16: the "
        f"larger of the bytes over {COPY_RATE / 1e12:.1f} TB/s, which is assumed of a copy, and of "
        f"the instructions over {ISSUE_RATE / 1e12:.1f} T lane instructions a second, the "
        "datasheet's. Launches and the latency of short kernels are not in them; excite is all "
        "latency."
    )
    targets = table(["target", "to reach", "reached"], [[*row, UNMEASURED] for row in TARGETS])
    passes = table(["pass", "what it moves", *head, "measured"], rows)
    return "\n\n".join(["## NVIDIA H200: targets and predictions", words, targets, passes])
