"""The predictions for a GPU: shapes, and what is to be read where one has measured."""

from __future__ import annotations

import pytest

from benchmarks import report, targets
from shapes import shapes_of


@pytest.mark.parametrize("network", targets.NETWORKS)
def test_blocks_are_the_networks(network: str) -> None:
    found = [block for block in targets.blocks(network) for _ in range(block.repeats)]
    assert [block._replace(repeats=1) for block in found] == [
        targets.Block(
            *(b.kernel, b.stride),
            x=64 * b.channels[1] * b.size**2,
            y=64 * b.channels[1] * b.out_size**2,
            out=64 * b.channels[2] * b.out_size**2,
            weights=2 * b.channels[1] * b.squeezed,
            vectors=64 * b.channels[1],
            residual=b.residual,
            repeats=1,
        )
        for b in shapes_of(network).blocks
    ]


def test_predictions_follow_the_larger_limit() -> None:
    """240 channels, 28 x 28, K = 5: bound by instructions, as docs/performance.md has it."""
    block = next(b for b in targets.blocks("b0") if (b.kernel, b.stride, b.x) == (5, 1, 12042240))
    forward, backward = (one.seconds(block) for one in targets.PASSES[:2])
    assert forward == pytest.approx(20e-6, rel=0.02)
    assert backward == pytest.approx(41e-6, rel=0.02)
    assert targets.PASSES[3].seconds(block) == pytest.approx(2 * block.y / 4.3e12)


def test_the_section_names_nothing_measured() -> None:
    rows = [line for line in targets.section(report.table).splitlines() if line.startswith("| ")]
    body = [line for line in rows if not line.startswith(("| ---", "| target", "| pass"))]
    assert len(body) == len(targets.TARGETS) + len(targets.PASSES)
    assert all(line.endswith("| not measured |") for line in body)
