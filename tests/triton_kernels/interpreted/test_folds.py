"""The folds of partial results, interpreted, over more parts than one program takes."""

from __future__ import annotations

import pytest
import torch

from effnet_fast.triton_kernels.folds import (
    fold_segments,
    fold_statistics,
    fold_sums,
    segments_of,
)
from tiers import some

LEVELS = {1: 1, 2: 1, 3: 2, 5: 3, 8: 3}  # of folds of two parts each, by the number of parts
ANY_NUMBER = pytest.mark.parametrize("parts", some(LEVELS, (1, 3, 8)))


@ANY_NUMBER
def test_sums(parts: int, two_parts_a_run: list[int]) -> None:
    partial = torch.randn(3, parts, 7)
    expected = 0.5 * partial.double().sum(1)
    torch.testing.assert_close(fold_sums(partial, 0.5), expected.float())
    assert len(two_parts_a_run) == LEVELS[parts]


@ANY_NUMBER
def test_statistics(parts: int, two_parts_a_run: list[int]) -> None:
    """The biased variance of parts of different sizes."""
    tiles = [torch.randn(4 + part, 6).double() + 3 for part in range(parts)]
    rows = [
        torch.stack([torch.full((6,), float(len(t))), t.mean(0), t.var(0, correction=0) * len(t)])
        for t in tiles
    ]
    partial = torch.stack([torch.cat([row, row.new_zeros(1, 6)]) for row in rows]).float()
    mean, var = fold_statistics(partial)
    whole = torch.cat(tiles)
    torch.testing.assert_close(mean, whole.mean(0).float())
    torch.testing.assert_close(var, whole.var(0, correction=0).float())
    assert len(two_parts_a_run) == LEVELS[parts]


@pytest.mark.parametrize(("pixels", "tile_rows"), [(5, 8), (7, 4), (1, 4), (49, 64)])
def test_segments(pixels: int, tile_rows: int) -> None:
    """Each image's rows, wherever the tiles cut it."""
    images, channels = 3, 6
    values = torch.randn(images * pixels, channels)
    tiles = -(-len(values) // tile_rows)
    partial = torch.zeros(tiles, segments_of(pixels, tile_rows), 1, channels)
    for row, value in enumerate(values):
        tile = row // tile_rows
        partial[tile, row // pixels - tile * tile_rows // pixels, 0] += value
    sums = fold_segments(partial, images, pixels, tile_rows)
    torch.testing.assert_close(sums[0], values.view(images, pixels, channels).sum(1))


def test_a_tile_has_room_for_every_image_that_it_touches() -> None:
    for pixels in range(1, 20):
        for tile_rows in range(1, 40):
            touched = max(
                (first + tile_rows - 1) // pixels - first // pixels + 1 for first in range(pixels)
            )
            assert segments_of(pixels, tile_rows) == touched
