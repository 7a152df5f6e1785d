"""The table of tiles: every shape of every network fits, and every row is there for a reason."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from effnet_fast.backends import CUDA_KERNELS, native
from effnet_fast.models import VARIANTS
from effnet_fast.ops.cuda import tiles
from effnet_fast.ops.cuda.launching import DTYPES
from parity import NEEDS_SIMT
from shapes import shapes_of

SHARED_BYTES = 99 * 1024  # of a block, on the architecture that has the least
MAX_THREADS = 256
EMPTY = 0.5  # of a launch's pixels and channels, at the most (B2's maps of 9x9)
EMPTY_ON_AVERAGE = 0.15
WARP = 32
BATCHES = (1, 8, 64)


def network_shapes() -> list[tuple[int, int, int, int, int]]:
    """(K, stride, C, size, size of the output) of every depthwise convolution."""
    shapes = {
        (b.kernel, b.stride, b.channels[1], b.size, b.out_size): None
        for variant in VARIANTS
        for b in shapes_of(variant).blocks
    }
    return list(shapes)


def tile_of(
    direction: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, n: int
) -> tuple[tiles.Tile, tuple[int, ...]]:
    kernel, stride, c, size, out = shape
    width = out if direction == "forward" else size
    tile = tiles.tile_for(direction, kernel, stride, dtype, c, width)
    pad = (kernel - 1) // 2
    side = width if direction == "forward" else size + pad % stride
    tile = tiles.filling(tile, n, c, side, side)
    return tile, (n, c, size, size, out, out, kernel, stride, pad, pad)


@pytest.mark.slow
@NEEDS_SIMT
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", BATCHES)
def test_every_network_fits(n: int, dtype: torch.dtype, direction: str) -> None:
    kernels = native.load_simt().cuda
    for shape in network_shapes():
        tile, sizes = tile_of(direction, shape, dtype, n)
        assert tile.lanes * tile.nx * tile.ny <= MAX_THREADS
        backward = direction == "backward"
        used = kernels.dwconv_shared_bytes(sizes, DTYPES[dtype], tile, backward)
        assert 0 < used <= SHARED_BYTES, (shape, tile)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_little_of_a_launch_is_empty(direction: str) -> None:
    """Of its pixels and channels, and of the lanes of a block's last warp."""
    shares = []
    for shape in network_shapes():
        tile, _ = tile_of(direction, shape, torch.bfloat16, 64)
        c, side = shape[2], shape[4] if direction == "forward" else shape[3]
        channels, width = 2 * tile.lanes, tile.nx * tile.cols
        height = tile.ny * tile.rows
        covered = -(-c // channels) * channels * -(-side // width) * width * -(-side // height)
        threads = tile.lanes * tile.nx * tile.ny
        covered *= height * -(-threads // WARP) * WARP / threads
        shares.append(1 - c * side * side / covered)
        assert shares[-1] < EMPTY, (shape, tile)
    assert sum(shares) / len(shares) < EMPTY_ON_AVERAGE


def test_rows_are_in_order_and_say_where_they_come_from() -> None:
    assert set(tiles.TILES) == set(itertools.product(("forward", "backward"), CUDA_KERNELS, (1, 2)))
    for rows in tiles.TILES.values():
        widths = [row.width for row in rows]
        assert widths == sorted(set(widths))
        assert widths[-1] == tiles.ANY
        for row in rows:
            assert re.fullmatch(r"heuristic|measured\(.+, [0-9a-f]{7,}\)", row.source)


@pytest.mark.slow
@NEEDS_SIMT
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("n", BATCHES)
def test_a_launch_fills_the_device(n: int, direction: str) -> None:
    """Or it cannot be cut up further; a launch that fills it anyway keeps the table's tile."""
    kernels = native.load_simt().cuda
    for shape in network_shapes():
        tile, sizes = tile_of(direction, shape, torch.bfloat16, n)
        strips = -(-shape[2] // (2 * tile.lanes))
        blocks = strips * kernels.dwconv_parts(sizes, tile, direction == "backward")[1]
        assert blocks >= tiles.BLOCKS or (tile.images, tile.bands) == (1, 1), (shape, tile)
        whole, _ = tile_of(direction, shape, torch.bfloat16, 1 << 20)
        parts = kernels.dwconv_parts(sizes, whole, direction == "backward")[1]
        if strips * parts >= tiles.BLOCKS:
            assert tile == whole._replace(images=min(whole.images, n))


def test_few_images_take_small_blocks() -> None:
    """240 channels, 28 x 28, K = 5: 5 strips of 14 bands, of 48 channels each."""
    tile = tiles.tile_for("forward", 5, 1, torch.bfloat16, 240, 28)
    assert tiles.filling(tile, 1, 240, 28, 28) == tile._replace(bands=1)
    assert tiles.filling(tile, 64, 240, 28, 28) == tile._replace(bands=7)
    assert tiles.filling(tile, 1024, 240, 28, 28) == tile
    tile = tiles.tile_for("forward", 5, 1, torch.bfloat16, 1152, 7)  # 18 strips of one band
    assert tiles.filling(tile, 64, 1152, 7, 7) == tile._replace(images=2)
    assert tiles.filling(tile, 1, 1152, 7, 7) == tile._replace(images=1)


def test_lanes() -> None:
    assert [tiles.lanes_for(c, 2) for c in (32, 64, 96, 144, 240, 1152)] == [16, 32, 24, 24, 24, 32]
    assert [tiles.lanes_for(c, 4) for c in (1, 32, 64, 96)] == [4, 16, 16, 16]


@NEEDS_SIMT
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lanes": 6}, "lanes must be 4, 8, .. 32"),
        ({"nx": 40}, "must be 1 to 256 threads"),
        ({"images": 0}, "bands and images must be positive"),
        ({"rows": 0}, "rows and cols must be positive"),
    ],
)
def test_impossible_tiles_are_refused(changes: dict[str, int], text: str) -> None:
    tile = tiles.tile_for("forward", 3, 1, torch.float32, 16, 8)._replace(**changes)
    with pytest.raises(ValueError, match=re.escape(text)):
        native.load_simt().cuda.dwconv_parts((1, 16, 8, 8, 8, 8, 3, 1, 1, 1), tile, False)
