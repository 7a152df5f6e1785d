"""Networks beside the rule: what they use of a budget, how near they are, what rounding allows."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.models import VARIANTS, Stage, custom_variant
from effnet_fast.modules.widths import round_channels
from effnet_fast.scaling import CompoundScaling, Conditions, Fit, Point, count, fit
from effnet_fast.scaling.refinement import ENOUGH, Neighbourhood, Offset, _cells

SMALL_STAGES = (Stage(1, 3, 1, 16, 16, 1), Stage(4, 5, 2, 16, 24, 2), Stage(4, 3, 2, 24, 40, 2))


def check(found: Fit, limit: float) -> None:
    """The network is one of the rounding's, and lies where the offset says."""
    variant, rule = found.point.variant, CompoundScaling()
    for scaled, stage in zip(variant.stages, variant.baseline, strict=True):
        assert scaled.repeats == math.ceil(stage.repeats * variant.depth)
        assert scaled.out_channels == round_channels(stage.out_channels * variant.width)
        assert scaled.out_channels % 8 == 0
    assert variant.resolution % 8 == 0
    assert abs(variant.resolution - found.point.exact_resolution) <= 4
    at = rule.at(found.point.phi)
    factors = found.offset.depth, found.offset.width, found.offset.resolution
    own = variant.depth, variant.width, found.point.exact_resolution
    on_rule = at.depth, at.width, at.exact_resolution
    assert own == pytest.approx([a * b for a, b in zip(factors, on_rule, strict=True)])
    assert found.counts == count(variant)
    assert found.counts.macs <= limit


@pytest.mark.parametrize("macs", [50e6, 300e6, 415e6, 4.2e9, 60e9])
def test_uses_a_budget(macs: float) -> None:
    found = fit(target_macs=macs)
    check(found, macs)
    assert found.shares["macs"] >= ENOUGH
    assert found.binding == ("macs",)
    assert found.ray.phi == fit(target_macs=macs, refine=False).point.phi
    assert found.offset.distance < 0.15


def test_of_300_million() -> None:
    """The rule's own network stops at 85%, since every stage gets a block more just beyond."""
    found = fit(target_macs=300e6)
    assert found.ray_shares["macs"] < 0.86
    assert found.shares["macs"] >= ENOUGH
    assert found.offset.distance > 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.floats(7.3, 11.0), st.sampled_from(["macs", "params"]))
def test_uses_any_budget(exponent: float, name: str) -> None:
    """From 20M multiply-adds or 2M parameters on; a third of a million goes in steps of a tenth."""
    limit = 10 ** (exponent if name == "macs" else exponent - 1.0)
    found = fit(**{f"target_{name}": limit})
    if name == "macs":
        check(found, limit)
    assert ENOUGH <= found.shares[name] <= 1


def test_keeps_the_rule_where_it_uses_enough() -> None:
    macs = count(VARIANTS["b0"]).macs
    for limit in (macs, macs / 0.96):
        found = fit(target_macs=limit)
        assert found.point == found.ray
        assert found.offset == Offset()
        assert found.shares == found.ray_shares


def test_stays_on_the_rule_where_told() -> None:
    found = fit(target_macs=300e6, refine=False)
    assert found.point == found.ray == CompoundScaling().at(found.ray.phi)
    assert found.offset.distance == 0
    assert found.binding == ("macs",)


def test_of_several_limits_the_tightest_is_used() -> None:
    memory = Conditions(batch=4).memory(fit(target_macs=300e6).point.variant).peak
    found = fit(target_macs=300e6, target_params=40e6, target_memory=2.0 * memory, batch=4)
    assert found.shares["macs"] >= ENOUGH
    assert max(found.shares.values()) <= 1
    assert found.binding == ("macs",)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (CompoundScaling(2.0, 1.0, 1.0), ("width", "resolution")),
        (CompoundScaling(1.0, 1.4, 1.0), ("depth", "resolution")),
        (CompoundScaling(1.0, 1.0, 1.4), ("depth", "width")),
    ],
)
def test_dimensions_that_the_rule_does_not_grow_stay(
    rule: CompoundScaling, kept: tuple[str, ...]
) -> None:
    found = fit(target_macs=700e6, scaling=rule)
    base = {"depth": 1.0, "width": 1.0, "resolution": 224}
    for name in kept:
        assert getattr(found.point.variant, name) == base[name]
        assert getattr(found.offset, name) == 1.0
    assert found.shares["macs"] >= found.ray_shares["macs"]


@pytest.mark.slow
def test_nothing_nearer_uses_enough() -> None:
    """Against networks drawn around the rule, each at the distance of its own multipliers."""
    found = fit(target_macs=300e6)
    rule, draw = CompoundScaling(), random.Random(0)
    enough = 0
    for _ in range(1500):
        phi = found.ray.phi + draw.uniform(-1.0, 1.5)
        offset = Offset(*(math.exp(draw.gauss(0, 0.04)) for _ in range(3)))
        at = rule.at(phi)
        side = math.floor(at.exact_resolution * offset.resolution / 8 + 0.5) * 8
        variant = custom_variant(
            depth=at.depth * offset.depth, width=at.width * offset.width, resolution=side
        )
        if ENOUGH <= count(variant).macs / 300e6 <= 1:
            enough += 1
            assert offset.distance >= found.offset.distance - 1e-6
    assert enough > 10


def test_where_nothing_uses_enough_the_most_is_taken() -> None:
    """A budget that no network meets: sides are multiples of 64, and nothing else may change."""
    rule = CompoundScaling(1.0, 1.0, 1.2)
    found = fit(target_macs=600e6, scaling=rule, multiple=64)
    assert found.shares["macs"] < ENOUGH
    assert found.point.resolution == found.ray.resolution
    assert found.binding == ("macs",)


def test_own_stages() -> None:
    found = fit(target_macs=20e6, stages=SMALL_STAGES, base_resolution=96)
    assert found.point.variant.baseline == SMALL_STAGES
    assert found.shares["macs"] >= ENOUGH


def test_cells_end_where_rounding_changes() -> None:
    """Inside a cell nothing changes, and two neighbours differ."""
    channels = (32, 16, 24, 40, 80, 112, 192, 320)
    at = CompoundScaling().at(0.6)
    near = Neighbourhood(at, CompoundScaling(), at.variant.baseline, 224, 8, lambda v: {})
    previous = None
    for cell in near._width_cells(0.2):
        points = (cell.low, cell.middle, cell.high)
        networks = {tuple(round_channels(c * w) for c in channels) for w in points}
        assert len(networks) == 1
        previous = networks
    assert previous is not None
    for cell in near._depth_cells(0.2):
        points = (cell.low, cell.middle, cell.high)
        assert len({tuple(math.ceil(n * d) for n in (1, 2, 3, 4)) for d in points}) == 1
    for cell, side in near._sides(0.2):
        for exact in (cell.low, cell.high):
            assert math.floor(exact / 8 + 0.5) * 8 == side
    assert [c.low for c in _cells(2.0, 0.0, [])] == [2.0]


def test_a_point_in_a_cell_of_the_rule_has_no_distance() -> None:
    """The rule's network, found again as a neighbour of itself."""
    rule = CompoundScaling()
    ray = rule.at(1.3)
    macs = count(ray.variant).macs
    near = Neighbourhood(
        ray,
        rule,
        ray.variant.baseline,
        224,
        8,
        lambda variant: {"macs": count(variant).macs / macs},
    )
    refined = near.refine(["macs"])
    assert refined is not None
    point, offset = refined
    assert isinstance(point, Point)
    assert offset.distance < 1e-6
    assert point.variant.stages == ray.variant.stages
