"""The network that a budget buys, against a search over a grid of phi."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.models import VARIANTS
from effnet_fast.scaling import CompoundScaling, Counts, count, fit
from effnet_fast.scaling.budget import SMALLEST_PHI

GRID = [SMALLEST_PHI] + [step / 100 for step in range(-3000, 901)]


def used(counts: Counts) -> dict[str, int]:
    return {"flops": counts.flops, "macs": counts.macs, "params": counts.parameters}


@pytest.fixture(scope="module")
def grid() -> list[tuple[float, Counts]]:
    scaling = CompoundScaling()
    return [(phi, count(scaling.at(phi).variant)) for phi in GRID]


@settings(max_examples=40)
@given(
    st.sampled_from([{"macs"}, {"flops"}, {"params"}, {"macs", "params"}, {"flops", "params"}]),
    st.floats(6.0, 10.0),
    st.floats(5.0, 8.0),
)
def test_no_point_of_a_grid_is_better(
    grid: list[tuple[float, Counts]], names: set[str], work: float, size: float
) -> None:
    limits = {name: 10.0 ** (size if name == "params" else work) for name in names}
    found = None
    with contextlib.suppress(ValueError):
        found = fit(**{f"target_{name}": limit for name, limit in limits.items()})

    def fits(counts: Counts) -> bool:
        return all(used(counts)[name] <= limit for name, limit in limits.items())

    best = max((phi for phi, counts in grid if fits(counts)), default=None)
    if found is None or best is None:
        assert found is best is None
        return
    assert fits(found.counts)
    assert found.counts == count(found.point.variant)
    assert found.point.phi >= best
    for name, share in found.shares.items():
        assert share == used(found.counts)[name] / limits[name]
    beyond = count(CompoundScaling().at(found.point.phi + 1e-9).variant)
    assert set(found.binding) == {n for n, limit in limits.items() if used(beyond)[n] > limit}


def test_says_what_binds() -> None:
    b0 = count(VARIANTS["b0"])
    assert fit(target_macs=b0.macs, target_params=1e12).binding == ("macs",)
    assert fit(target_macs=1e12, target_params=b0.parameters).binding == ("params",)


def test_flops_are_twice_the_macs() -> None:
    assert fit(target_flops=2e9).counts == fit(target_macs=1e9).counts


def test_takes_less_than_two_seconds() -> None:
    start = time.perf_counter()
    fit(target_macs=5e9, target_params=3e7)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of target_flops, .* and target_latency"),
        ({"target_macs": 0}, "target_macs must be positive"),
        ({"target_params": float("nan")}, "target_params must be positive"),
        ({"target_macs": 10.0}, "the smallest needs [0-9]+ parameters, [0-9]+ multiply-adds"),
        ({"target_macs": 1e30}, "beyond phi = 32"),
        ({"target_macs": 1e9, "scaling": CompoundScaling(1, 1, 1)}, "makes the network larger"),
    ],
)
def test_bad_budgets(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**options)
