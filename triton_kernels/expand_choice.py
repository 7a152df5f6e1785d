"""Whether a block's expansion and depthwise convolution run as one kernel: a model of their time.

Bytes, products, special functions and instructions of both ways are counted from the shape and the
tile sizes; the slowest of the four sets a kernel's time. The counts of instructions are those of
the code that Triton 3.6 makes for sm_90 in bf16; rates are datasheet figures or estimates. Nothing
here was measured: the choice's source is "heuristic".
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

from . import tuning

SOURCE = "heuristic"
MARGIN = 0.9  # of the separate kernels' time that one kernel may take, to be chosen
MAX_CHANNELS = 128  # of x: the product's inner dimension is one tile, held in registers
RUNS = (32, 16, 8, 4)  # rows of a strip, tried in this order
# An H200: bytes/s, FLOP/s of 16-bit products by warps (60% of 790 T: Luo et al., arXiv 2402.13499,
# table 9), special functions/s (an eighth of 33.5 T lane instructions), processors, cycles/s.
BANDWIDTH, PRODUCTS, SPECIAL, PROCESSORS, CLOCK = 4.0e12, 474e12, 4.2e12, 132, 1.75e9
LAUNCH = 2e-6  # seconds from one kernel of a graph to the next
WARPS = 16  # at home on a processor with the registers that these kernels take
CYCLES = 5  # from one instruction of a warp to its next, four warps sharing a scheduler
POINTWISE = (49, 32)  # instructions per output, outputs per thread
# By kernel and stride: the same of the depthwise kernel; and instructions of the fused one per
# value of e that it forms, with 16 channels of x, and per 16 channels more.
DEPTHWISE = {(3, 1): (91, 16), (3, 2): (100, 16), (5, 1): (184, 8), (5, 2): (204, 8)}
FUSED = {(3, 1): 36.0, (3, 2): 17.2, (5, 1): 62.0, (5, 2): 27.6}
PER_16_CHANNELS = 1.2


class Shape(NamedTuple):
    """A block's first half: x [n,in_channels,height,width] to y [n,channels,out_h,out_w].

    Attributes:
        element_size: bytes of an element of x.
    """

    n: int
    in_channels: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    element_size: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of x, of the expanded tensor e and of y."""
        pixels = self.n * self.height * self.width
        outputs = self.n * self.out_height * self.out_width
        return pixels * self.in_channels, pixels * self.channels, outputs * self.channels


class Tile(NamedTuple):
    """What a program of the fused kernel owns: see expand_dwconv.py.

    Attributes:
        pixels, channels, warps: P, BC and num_warps.
    """

    pixels: int
    channels: int
    warps: int


def tile_of(x: Tensor, shape: Shape) -> tuple[dict[str, int], Tile]:
    """The configuration that the table has for x's device and dtype, and the tile in it."""
    config = tuning.config(
        "expand_dwconv_fwd", x, k=shape.in_channels, c=shape.channels, h=shape.out_height,
        w=shape.out_width, kernel=shape.kernel, stride=shape.stride,
    )  # fmt: skip
    return config, Tile(config["P"], config["BC"], config["num_warps"])


class Cost(NamedTuple):
    """What the kernels of one way do: bytes to and from memory, FLOPs, SiLUs, seconds."""

    bytes: int
    flops: int
    silus: int
    seconds: float


def _issue_seconds(warps: float, instructions: float) -> float:
    """Of that many warps, each with its instructions; one alone is no quicker than itself."""
    rounds = max(1.0, warps / (PROCESSORS * WARPS))
    return rounds * instructions * CYCLES / CLOCK


def _cost(moved: int, flops: int, silus: int, warps: float, instructions: float) -> Cost:
    seconds = max(
        moved / BANDWIDTH, flops / PRODUCTS, 2 * silus / SPECIAL,
        _issue_seconds(warps, instructions),
    )  # fmt: skip
    return Cost(moved, flops, silus, seconds + LAUNCH)


def _sum(costs: tuple[Cost, ...]) -> Cost:
    return Cost(*(sum(values) for values in zip(*costs, strict=True)))


def separate(shape: Shape) -> Cost:
    """The expansion's kernel and the depthwise kernel: e is written and read once."""
    x, e, y = shape.sizes
    instructions, outputs = POINTWISE
    expand = _cost(
        (x + e) * shape.element_size, 2 * e * shape.in_channels, e,
        e / (32 * outputs), instructions * outputs,
    )  # fmt: skip
    instructions, outputs = DEPTHWISE.get((shape.kernel, shape.stride), DEPTHWISE[5, 2])
    depthwise = _cost(
        (e + y) * shape.element_size, 0, y, y / (32 * outputs), instructions * outputs
    )
    return _sum((expand, depthwise))


def refusal(shape: Shape) -> str | None:
    """Why the fused kernel has no place in the choice, None where it has."""
    if shape.element_size > 2:
        return "products of fp32 are not made on tensor cores"
    if shape.in_channels > MAX_CHANNELS:
        return f"more than {MAX_CHANNELS} input channels"
    if (shape.kernel, shape.stride) not in FUSED:
        return f"no count for kernel {shape.kernel} and stride {shape.stride}"
    return None


def grid(shape: Shape, tile: Tile, run: int) -> tuple[int, int, int]:
    """Strips of at most `run` rows, columns and channel tiles that cover y."""
    columns = math.ceil(shape.out_width / ((tile.pixels - shape.kernel) // shape.stride + 1))
    strips = math.ceil(shape.out_height / run)
    return strips, columns, math.ceil(shape.channels / tile.channels)


def _fused(shape: Shape, tile: Tile, run: int) -> Cost:
    x, _, y = shape.sizes
    strips, columns, channel_tiles = grid(shape, tile, run)
    programs = shape.n * strips * columns * channel_tiles
    rows = math.ceil(shape.out_height / max(1, strips))
    steps = rows + math.ceil(shape.kernel / shape.stride) - 1
    formed = tile.channels * tile.pixels * shape.stride  # values of e in a step
    inner = max(16, 1 << (shape.in_channels - 1).bit_length())
    per_value = FUSED[shape.kernel, shape.stride] + PER_16_CHANNELS * (inner / 16 - 1)
    outputs = formed // shape.stride**2
    return _cost(
        (x + y) * shape.element_size,
        2 * programs * steps * formed * (inner + tile.pixels // shape.stride * shape.kernel),
        programs * steps * (formed + outputs),
        programs * tile.warps,
        steps * per_value * formed / (32 * tile.warps),
    )


@functools.cache
def strip_rows(shape: Shape, tile: Tile) -> int:
    """Rows of the fused kernel's strips: what is quickest by the model."""
    if refusal(shape) is not None:
        return RUNS[1]
    return min(RUNS, key=lambda run: _fused(shape, tile, run).seconds)


def fused(shape: Shape, tile: Tile) -> Cost | None:
    """The fused kernel; None where `refusal` says why not."""
    if refusal(shape) is not None:
        return None
    return _fused(shape, tile, strip_rows(shape, tile))


@functools.cache
def is_joined_quicker(shape: Shape, tile: Tile) -> bool:
    """Whether the fused kernel is chosen."""
    cost = fused(shape, tile)
    return cost is not None and cost.seconds <= MARGIN * separate(shape).seconds
