"""How time and memory grow with the batch, the resolution and the compound coefficient.

`pytest benchmarks/bench_growth.py --benchmark-only`; the report fits exponents to the results.
"""

from __future__ import annotations

import pytest

from benchmarks import network_contests as networks
from benchmarks.contest import OURS, Contest
from benchmarks.params import full_unless

CONTESTANTS = (OURS, "torch_channels_last")
BATCHES = [networks.Case("b0", batch) for batch in (1, 2, 4, 8, 16, 32, 64)]
SIDES = [networks.Case("b0", 1, side) for side in (64, 128, 224, 320, 448, 640, 800)]
PHIS = [networks.Case(f"phi{phi}", 1) for phi in range(7)]


def _contest(series: str, case: networks.Case, device: str) -> Contest:
    return networks.contest(
        *(case, "inference", "fp32", device), what=f"growth with {series}", names=CONTESTANTS
    )


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", full_unless([], BATCHES, key="id"))
def test_batch(enter, case: networks.Case, device: str, contestant: str) -> None:
    enter(contestant, _contest, "batch", case, device)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", full_unless([], SIDES, key="id"))
def test_resolution(enter, case: networks.Case, device: str, contestant: str) -> None:
    enter(contestant, _contest, "resolution", case, device)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", full_unless([], PHIS, key="id"))
def test_phi(enter, case: networks.Case, device: str, contestant: str) -> None:
    enter(contestant, _contest, "phi", case, device)
