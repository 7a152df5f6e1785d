"""The scaling rule, the published networks beside it, and networks of one's own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import effnet_fast
from effnet_fast.models import VARIANTS, Stage, custom_variant
from effnet_fast.models.variants import B0_STAGES
from effnet_fast.scaling import CompoundScaling, count, fit_phi, published
from networks import LITES


def test_baseline_is_b0() -> None:
    point = CompoundScaling().at(0)
    assert point.variant.stages == VARIANTS["b0"].stages
    assert (point.depth, point.width, point.resolution) == (1.0, 1.0, 224)
    assert count(point.variant) == count(VARIANTS["b0"])


def test_constants_double_the_work() -> None:
    scaling = CompoundScaling()
    assert scaling.growth == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    assert 1.9 < scaling.growth < 2.0


def test_one_unit_of_phi() -> None:
    point = CompoundScaling(alpha=2.0, beta=1.5, gamma=1.25).at(1)
    assert (point.depth, point.width, point.exact_resolution) == (2.0, 1.5, 280.0)
    assert [s.repeats for s in point.variant.stages] == [2, 4, 4, 6, 6, 8, 2]
    assert [s.out_channels for s in point.variant.stages] == [24, 40, 64, 120, 168, 288, 480]
    assert point.variant.stem_channels == 48


@pytest.mark.slow
@given(st.floats(-2, 8), st.floats(0, 3))
def test_grows_with_phi(phi: float, step: float) -> None:
    scaling = CompoundScaling()
    small, large = count(scaling.at(phi).variant), count(scaling.at(phi + step).variant)
    assert small.parameters <= large.parameters
    assert small.macs <= large.macs
    assert small.activations <= large.activations


@pytest.mark.parametrize("multiple", [1, 8, 32])
@pytest.mark.parametrize("phi", [-30.0, -1.0, 0.4, 3.7])
def test_resolution_is_the_nearest_multiple(phi: float, multiple: int) -> None:
    point = CompoundScaling().at(phi, multiple=multiple)
    assert point.resolution % multiple == 0
    assert point.resolution >= multiple
    nearest = abs(point.resolution - point.exact_resolution) <= multiple / 2
    assert nearest or point.resolution == multiple


def test_published_networks_lie_near_the_rule() -> None:
    beside = published()
    assert list(beside) == list(VARIANTS)
    for family in (list(VARIANTS)[:10], LITES):
        phis = [fit_phi(beside[name][0]) for name in family]
        assert phis == sorted(phis)
        assert phis[0] == 0.0
    for variant, point in beside.values():
        assert point.depth == pytest.approx(variant.depth, rel=0.25)
        assert point.width == pytest.approx(variant.width, rel=0.75)
        assert point.exact_resolution == pytest.approx(variant.resolution, rel=0.25)


def test_fit_finds_phi_again() -> None:
    scaling = CompoundScaling(1.3, 1.05, 1.2)
    point = scaling.at(2.5, multiple=1)
    assert fit_phi(point.variant, scaling) == pytest.approx(2.5, abs=0.01)


def test_own_baseline_runs() -> None:
    stages = (Stage(1, 3, 2, 16, 8, 1), Stage(4, 5, 2, 8, 16, 2))
    model = effnet_fast.efficientnet(depth=1.5, width=2.0, stages=stages, num_classes=5).eval()
    assert sum(isinstance(m, effnet_fast.models.EfficientNet) for m in model.modules()) == 1
    with torch.inference_mode():
        fused = model(torch.ones(2, 3, 40, 33))
        with effnet_fast.use_backend("reference"):
            stock = model(torch.ones(2, 3, 40, 33))
    assert fused.shape == (2, 5)
    torch.testing.assert_close(fused, stock)
    variant = custom_variant(depth=1.5, width=2.0, stages=stages)
    assert [stage.repeats for stage in variant.stages] == [2, 3]
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == count(variant, num_classes=5).parameters


def test_efficientnet_without_arguments_is_b0() -> None:
    torch.manual_seed(0)
    ours = effnet_fast.efficientnet().state_dict()
    torch.manual_seed(0)
    for name, tensor in effnet_fast.efficientnet_b0().state_dict().items():
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize(
    "constants",
    [{"alpha": 0.9}, {"beta": math.nan}, {"gamma": math.inf}, {"alpha": None}, {"beta": "1.1"}],
)
def test_bad_constants(constants: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 1"):
        CompoundScaling(**constants)


def test_bad_points() -> None:
    scaling = CompoundScaling()
    for phi in (math.nan, math.inf, None, "1"):
        with pytest.raises(ValueError, match="phi must be a finite number"):
            scaling.at(phi)
    for far in (-1e6, 1e6):
        with pytest.raises(ValueError, match="is too far from 0"):
            scaling.at(far)
    for name in ("multiple", "base_resolution"):
        for size in (0, 2.5, True, None):
            with pytest.raises(ValueError, match=f"{name} must be an int of at least 1"):
                scaling.at(1, **{name: size})
    with pytest.raises(ValueError, match="phi changes nothing"):
        fit_phi(VARIANTS["b0"], CompoundScaling(1, 1, 1))


def test_numbers_of_numpy_are_taken() -> None:
    scaling = CompoundScaling(numpy.float64(1.2), numpy.float32(1.1), 1.15)
    point = scaling.at(numpy.float64(1.5), multiple=numpy.int64(8))
    assert point.resolution == scaling.at(1.5).resolution
    variant = custom_variant(depth=numpy.float32(1), resolution=numpy.int64(96))
    assert {type(point.resolution), type(variant.resolution)} == {int}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": None}, "depth must be a positive finite number"),
        ({"stages": [replace(B0_STAGES[0], repeats=0)]}, "repeats of a stage must be at least 1"),
        ({"depth": 0.0}, "depth must be a positive finite number"),
        ({"width": math.inf}, "width must be a positive finite number"),
        ({"resolution": 0}, "resolution must be an int of at least 1"),
        ({"resolution": 224.0}, "resolution must be an int of at least 1"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": (B0_STAGES[0], B0_STAGES[2])}, "16 output channels is followed by one of 24"),
    ],
)
def test_bad_networks(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effnet_fast.efficientnet(**options)
