"""How the depthwise kernels are cut up: the tile of each kind of shape.

csrc/cuda/args.h says what a tile's numbers mean. A block of channels is as wide as 128 bytes of a
pixel, or narrower where that leaves less of it empty.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

HEURISTIC = "heuristic"  # chosen by counting, not measured; else "measured(device, commit)"
LANES = {2: (32, 24, 16, 12, 8, 4), 4: (16, 12, 8, 4)}  # by bytes of an element, two channels each
WASTE = 1 / 16  # channels of the last block that may lie empty, as a share of C
THREADS = 128  # of a block, at the least where the image has the rows
WARP = 32
BLOCKS = 4 * 132  # of a launch, where the shape has them: four on each multiprocessor of an H200


class Tile(NamedTuple):
    """A tile of csrc/cuda/args.h."""

    rows: int
    cols: int
    lanes: int
    nx: int
    ny: int
    bands: int
    images: int


class Row(NamedTuple):
    """The tile for widths up to `width`: of y in the forward pass, of x in backward."""

    width: int
    rows: int
    cols: int
    nx: int
    ny: int
    bands: int
    images: int
    source: str = HEURISTIC


ANY = 1 << 24

# Widths are those of the networks at their own resolutions: 224 gives 7, 14 .. 112, 380 gives
# 12, 24 .. 190, 600 gives 19, 38 .. 300.
_FORWARD_1 = (
    Row(7, 2, 7, 1, 4, 1, 4),
    Row(8, 4, 4, 2, 2, 1, 4),
    Row(12, 4, 4, 3, 1, 3, 2),
    Row(14, 2, 7, 2, 2, 4, 2),
    Row(16, 4, 4, 4, 1, 4, 2),
    Row(20, 4, 4, 5, 1, 5, 1),
    Row(24, 4, 4, 6, 1, 6, 1),
    Row(28, 2, 7, 4, 1, 14, 1),
    Row(40, 4, 4, 5, 1, 10, 1),
    Row(48, 4, 4, 6, 1, 12, 1),
    Row(56, 2, 7, 4, 1, 14, 1),
    Row(96, 4, 4, 6, 1, 12, 1),
    Row(112, 2, 7, 4, 1, 14, 1),
    Row(ANY, 4, 4, 5, 1, 10, 1),
)
_FORWARD_2 = (
    Row(8, 2, 4, 2, 2, 2, 1),
    Row(12, 2, 4, 3, 1, 6, 1),
    Row(16, 2, 4, 4, 1, 7, 1),
    Row(20, 2, 4, 5, 1, 10, 1),
    Row(24, 2, 4, 3, 2, 6, 1),
    Row(32, 2, 4, 4, 1, 14, 1),
    Row(48, 2, 4, 4, 1, 12, 1),
    Row(ANY, 2, 4, 5, 1, 14, 1),
)
_BACKWARD = (
    Row(8, 2, 4, 2, 2, 2, 4),
    Row(12, 2, 4, 3, 1, 6, 2),
    Row(16, 2, 4, 4, 1, 8, 2),
    Row(20, 2, 4, 5, 1, 10, 1),
    Row(24, 2, 4, 3, 1, 12, 1),
    Row(32, 2, 4, 4, 1, 14, 1),
    Row(ANY, 2, 4, 5, 1, 16, 1),
)
# By pass, kernel and stride.
TILES = {
    ("forward", 3, 1): _FORWARD_1,
    ("forward", 5, 1): _FORWARD_1,
    ("forward", 3, 2): _FORWARD_2,
    ("forward", 5, 2): _FORWARD_2,
    ("backward", 3, 1): _BACKWARD,
    ("backward", 5, 1): _BACKWARD,
    ("backward", 3, 2): _BACKWARD,
    ("backward", 5, 2): _BACKWARD,
}
KERNELS = tuple(dict.fromkeys(kernel for _, kernel, _ in TILES))


def lanes_for(channels: int, element_size: int) -> int:
    """Threads side by side on a pixel: the most that leave little of the last block empty."""
    empty = {lanes: -channels % (2 * lanes) for lanes in LANES[element_size]}
    for lanes, count in empty.items():
        if count <= WASTE * channels:
            return lanes
    return min(empty, key=lambda lanes: (empty[lanes], -lanes))


@functools.cache
def tile_for(
    direction: str, kernel: int, stride: int, dtype: torch.dtype, channels: int, width: int
) -> Tile:
    """The tile of a shape: its row's, one thread narrower where that leaves fewer lanes empty.

    Args:
        direction: "forward" or "backward".
        kernel, stride: a pair of TILES.
        dtype: of x.
        channels: C.
        width: columns of y in the forward pass, of x in backward.

    Raises:
        KeyError: there is no kernel of this size and stride.
    """
    row = next(row for row in TILES[direction, kernel, stride] if width <= row.width)
    lanes = lanes_for(channels, dtype.itemsize)
    narrower = _tile(row, lanes, max(1, row.nx - 1))
    return min(_tile(row, lanes, row.nx), narrower, key=lambda tile: _covered(tile, width))


def _tile(row: Row, lanes: int, nx: int) -> Tile:
    """The row's tile, of at least THREADS threads where it has the bands."""
    ny, bands = row.ny, row.bands
    while bands > 1 and lanes * nx * ny * 2 <= THREADS:
        ny, bands = 2 * ny, -(-bands // 2)
    return Tile(row.rows, row.cols, lanes, nx, ny, bands, row.images)


def _covered(tile: Tile, width: int) -> float:
    """Columns that a launch's threads stand on, those of the last warps' empty lanes included."""
    threads, columns = tile.lanes * tile.nx * tile.ny, tile.nx * tile.cols
    return -(-width // columns) * columns * -(-threads // WARP) * WARP / threads


def filling(tile: Tile, n: int, channels: int, rows: int, columns: int) -> Tile:
    """The tile with so few images, then bands, in a block that a launch fills the device.

    The choice depends on the shape alone. A block of half as many bands reads its K - stride rows
    of halo twice as often, from the L2 cache, where its neighbours have brought them.

    Args:
        tile: as `tile_for` gives it.
        n, channels: N and C.
        rows, columns: of y in the forward pass; in backward of x, and the rest of its padding
            left and above over the stride.
    """
    all_bands = -(-rows // (tile.ny * tile.rows))
    images, bands = min(tile.images, n), min(tile.bands, all_bands)
    strips = -(-channels // (2 * tile.lanes)) * -(-columns // (tile.nx * tile.cols))
    while strips * -(-all_bands // bands) * -(-n // images) < BLOCKS and (images > 1 or bands > 1):
        if images > 1:
            images = -(-images // 2)
        else:
            bands = -(-bands // 2)
    return tile._replace(images=images, bands=bands)
