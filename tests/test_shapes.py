"""The table of shapes, against the analytic counts of the same networks."""

from __future__ import annotations

import pytest

from effnet_fast.models import VARIANTS
from effnet_fast.scaling import convolutions
from shapes import BlockShape, DenseShape, shapes_of


def _of_block(block: BlockShape) -> list[tuple[str, int, int, int, int, int]]:
    c, expanded, out = block.channels
    rows = [
        ("depthwise", expanded, expanded, block.kernel, block.stride, block.out_size),
        ("project", expanded, out, 1, 1, block.out_size),
    ]
    if block.squeezed:
        rows.append(("reduce", expanded, block.squeezed, 1, 1, 1))
        rows.append(("excite", block.squeezed, expanded, 1, 1, 1))
    return [("expand", c, expanded, 1, 1, block.size), *rows] if block.expands else rows


def _of_dense(kind: str, shape: DenseShape) -> tuple[str, int, int, int, int, int]:
    return (kind, shape.channels, shape.out_channels, shape.kernel, shape.stride, shape.out_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_counts(name: str) -> None:
    shapes = shapes_of(name)
    rows = [_of_dense("stem", shapes.stem)]
    for block in shapes.blocks:
        rows += _of_block(block)
    rows.append(_of_dense("head", shapes.head))
    counted: dict[tuple[str, int, int, int, int, int], int] = {}
    for c in convolutions(VARIANTS[name]):
        key = (c.kind, c.in_channels, c.out_channels, c.kernel, c.stride, c.side)
        counted[key] = counted.get(key, 0) + c.repeats
    del counted["classifier", shapes.head.out_channels, 1000, 1, 1, 1]
    assert {row: rows.count(row) for row in rows} == counted


def test_resolution() -> None:
    sizes = [block.size for block in shapes_of("b0", 65).blocks]
    assert (sizes[0], sizes[-1]) == (33, 3)
