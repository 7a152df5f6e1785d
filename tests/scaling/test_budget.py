"""The network that a budget buys, against a search over a grid of phi."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_fast.models import VARIANTS, Variant
from effnet_fast.scaling import (
    CompoundScaling,
    Conditions,
    Counts,
    LatencyModel,
    Point,
    budget,
    count,
    fit,
    max_batch,
)
from effnet_fast.scaling.budget import SMALLEST_PHI
from effnet_fast.scaling.latency import FEATURES, Prices
from effnet_fast.scaling.refinement import ENOUGH

GRID = [SMALLEST_PHI] + [step / 100 for step in range(-3000, 901)]


def used(counts: Counts) -> dict[str, int]:
    return {"flops": counts.flops, "macs": counts.macs, "params": counts.parameters}


PRICES = (1e-4, 2e-11, 2e-10, 1e-10, 1e-10, 1e-10)  # of a slow machine


def latency_model(conditions: Conditions) -> LatencyModel:
    """One that nobody measured: blocks of the conditions' plan and of stock, twice as slow."""
    plans = {"stock": 2.0, conditions.plan: 1.0}
    prices = {
        plan: Prices(dict(zip(FEATURES, (factor * p for p in PRICES), strict=True)), 0.0, 0.0)
        for plan, factor in plans.items()
    }
    return LatencyModel(conditions, prices, (), "none", {}, 1)


@pytest.fixture(scope="module")
def grid() -> list[tuple[float, Counts]]:
    scaling = CompoundScaling()
    return [(phi, count(scaling.at(phi).variant)) for phi in GRID]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
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
    assert found.ray.phi >= best
    assert max(found.shares.values()) >= max(found.ray_shares.values())
    for name, share in found.shares.items():
        assert share == used(found.counts)[name] / limits[name]
    beyond = count(CompoundScaling().at(found.ray.phi + 1e-9).variant)
    binding = {n for n, limit in limits.items() if used(beyond)[n] > limit}
    if found.point != found.ray:
        binding = {n for n, share in found.shares.items() if share >= ENOUGH} or binding
    assert set(found.binding) == binding


# Memory and latency: under other conditions, each with the counted limits and without.
CONDITIONS = (
    Conditions(),
    Conditions(batch=8, dtype=torch.bfloat16, plan="stock"),
    Conditions(batch=16, training=True),
    Conditions(batch=4, training=True, plan="lean", dtype=torch.float16, optimizer_tensors=0),
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("conditions", CONDITIONS, ids=lambda c: f"{c.mode}_{c.plan}_b{c.batch}")
@settings(max_examples=6, deadline=None)
@given(memory=st.floats(6.0, 10.5), seconds=st.floats(-3.0, 1.0), macs=st.floats(7.0, 10.5))
def test_no_point_of_a_grid_is_better_under_conditions(
    conditions: Conditions, memory: float, seconds: float, macs: float
) -> None:
    model = latency_model(conditions)
    limits = {"memory": 10.0**memory, "latency": 10.0**seconds, "macs": 10.0**macs}

    def needs(variant: Variant) -> dict[str, float]:
        return {
            "memory": conditions.memory(variant).peak,
            "latency": model.predict(variant),
            "macs": count(variant).macs,
        }

    def fits(point: Point) -> bool:
        return all(used <= limits[name] for name, used in needs(point.variant).items())

    rule = CompoundScaling()
    best = max((phi for phi in range(-40, 10) if fits(rule.at(phi))), default=None)
    found = None
    targets = {f"target_{name}": limit for name, limit in limits.items()}
    if not fits(rule.at(SMALLEST_PHI)):
        with pytest.raises(ValueError, match="the smallest needs"):
            fit(**targets, **vars(conditions), latency_model=model)
        return
    found = fit(**targets, **vars(conditions), latency_model=model)
    assert fits(found.point)
    assert best is None or found.ray.phi >= best
    around = [found.ray.phi + step / 50 for step in range(1, 120)]
    assert not any(fits(rule.at(phi)) for phi in around)
    beyond = needs(rule.at(found.ray.phi + 1e-9).variant)
    binding = {name for name in limits if beyond[name] > limits[name]}
    if found.point != found.ray:
        binding = {n for n, share in found.shares.items() if share >= ENOUGH} or binding
    assert set(found.binding) == binding
    assert found.memory == conditions.memory(found.point.variant)
    assert found.latency == model.predict(found.point.variant)


def test_says_what_binds() -> None:
    b0 = count(VARIANTS["b0"])
    assert fit(target_macs=b0.macs, target_params=1e12).binding == ("macs",)
    assert fit(target_macs=1e12, target_params=b0.parameters).binding == ("params",)


def test_flops_are_twice_the_macs() -> None:
    assert fit(target_flops=2e9).counts == fit(target_macs=1e9).counts


def test_counts_few_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each halving, both ends of the interval, and what is told of the answer."""
    counted = []
    monkeypatch.setattr(budget, "count", lambda v, **o: counted.append(v) or count(v, **o))
    fit(target_macs=5e9, target_params=3e7, target_memory=1e9, batch=4, refine=False)
    assert len(counted) <= budget.STEPS + 6


@pytest.mark.slow
def test_memory_takes_the_conditions() -> None:
    """More images, wider numbers and training leave room for less."""
    sizes = [
        fit(target_memory=2e9, **vars(conditions)).point.phi
        for conditions in (
            Conditions(dtype=torch.bfloat16),
            Conditions(),
            Conditions(batch=8),
            Conditions(batch=8, training=True, plan="lean"),
            Conditions(batch=8, training=True, plan="fast"),
            Conditions(batch=8, training=True, plan="stock"),
        )
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_latency_of_the_named_plan_binds() -> None:
    model = latency_model(Conditions(plan="fused"))
    fused = fit(target_latency=0.02, plan="fused", latency_model=model)
    stock = fit(target_latency=0.02, plan="stock", latency_model=model)
    assert fused.binding == stock.binding == ("latency",)
    assert fused.point.phi > stock.point.phi
    assert fused.latency_model is model


def test_measures_when_no_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def calibrate(conditions: Conditions) -> LatencyModel:
        asked.append(conditions)
        return latency_model(conditions)

    monkeypatch.setattr("effnet_fast.scaling.budget.calibrate", calibrate)
    fit(target_macs=1e9)
    assert asked == []
    fit(target_latency=0.02, batch=2)
    assert asked == [Conditions(batch=2)]


@pytest.mark.parametrize("conditions", CONDITIONS, ids=lambda c: f"{c.mode}_{c.plan}")
@pytest.mark.parametrize("memory", [3e8, 8 * 2**30])
def test_largest_batch(conditions: Conditions, memory: float) -> None:
    variant = VARIANTS["b1"]

    def peak(batch: int) -> int:
        return replace(conditions, batch=batch).memory(variant).peak

    batch = max_batch(variant, memory, conditions)
    assert peak(batch) <= memory < peak(batch + 1)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 13])
def test_largest_batch_may_fill_the_memory(batch: int) -> None:
    memory = Conditions(batch=batch).memory(VARIANTS["b0"]).peak
    assert max_batch(VARIANTS["b0"], memory) == batch


@pytest.mark.parametrize("memory", [1e15, 3.3e16])
def test_largest_batch_has_no_ceiling(memory: float) -> None:
    conditions = Conditions(plan="stock")
    batch = max_batch(VARIANTS["b0"], memory, conditions)
    peaks = [replace(conditions, batch=b).memory(VARIANTS["b0"]).peak for b in (batch, batch + 1)]
    assert peaks[0] <= memory < peaks[1]


def test_no_image_fits() -> None:
    with pytest.raises(ValueError, match=r"one image takes \d+ bytes in inference, given were 5"):
        max_batch(VARIANTS["b7"], 5.0)
    with pytest.raises(ValueError, match="memory must be a positive number"):
        max_batch(VARIANTS["b7"], 0.0)
    with pytest.raises(ValueError, match="memory must be a positive number, got '8GiB'"):
        max_batch(VARIANTS["b7"], "8GiB")
    with pytest.raises(ValueError, match="memory must be finite"):
        max_batch(VARIANTS["b7"], float("inf"))


def test_names_of_dtypes_and_devices() -> None:
    assert Conditions(batch=numpy.int64(4)) == Conditions(batch=4)
    named = Conditions(dtype="bf16", device=torch.device("cuda", 1))
    assert named == Conditions(dtype=torch.bfloat16, device="cuda")
    assert named.plan == "stock"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be an int of at least 1"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'"),
        ({"plan": "lean"}, "plan must be one of stock, fused for inference"),
        ({"plan": "fused", "device": "cuda"}, "in fp32 and bf16, not cuda in fp32"),
        ({"plan": "fused", "dtype": torch.float16}, "in fp32 and bf16, not cpu in fp16"),
        ({"optimizer_tensors": -1}, "optimizer_tensors must be an int of at least 0"),
        ({"optimizer_tensors": 1.5}, "optimizer_tensors must be an int of at least 0"),
        ({"batch": True}, "batch must be an int of at least 1"),
        ({"training": None}, "training must be True or False"),
    ],
)
def test_bad_conditions(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(target_macs=1e9, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 2}, "measured with batch=1, not 2"),
        ({"training": True}, "measured with training=False, not True"),
        ({"dtype": torch.float16}, "measured with dtype=torch.float32, not torch.float16"),
    ],
)
def test_latency_of_other_conditions(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(target_latency=1.0, latency_model=latency_model(Conditions()), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of target_flops, .* and target_latency"),
        ({"target_macs": 0}, "target_macs must be a positive number"),
        ({"target_macs": "1G"}, "target_macs must be a positive number, got '1G'"),
        ({"target_macs": True}, "target_macs must be a positive number"),
        ({"target_params": float("nan")}, "target_params must be a positive number"),
        ({"target_macs": 10.0}, "the smallest needs [0-9]+ parameters, [0-9]+ multiply-adds"),
        ({"target_memory": 1e3}, "FLOPs and [0-9]+ bytes of memory; given were target_memory=1000"),
        ({"target_memory": float("inf")}, "beyond phi = 32"),
        ({"target_latency": -1.0}, "target_latency must be a positive number"),
        ({"target_macs": 1e30}, "beyond phi = 32"),
        ({"target_macs": 1e9, "scaling": CompoundScaling(1, 1, 1)}, "makes the network larger"),
    ],
)
def test_bad_budgets(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**options)
