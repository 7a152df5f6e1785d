"""The latency model: its solver, what it recovers, and its file."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import types
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from effnet_fast import timing
from effnet_fast.models import VARIANTS, custom_variant
from effnet_fast.scaling import (
    CompoundScaling,
    Conditions,
    LatencyModel,
    calibrate,
    latency,
)
from effnet_fast.scaling.latency import FEATURES, NETWORKS, Sample, features, fit_prices
from networks import LITES

PRICES = {
    "blocks": 1.3e-4,
    "pointwise_macs": 9e-12,
    "depthwise_macs": 1.2e-10,
    "stem_macs": 4e-11,
    "activation_bytes": 1.1e-10,
    "weight_bytes": 1.4e-10,
}
EMPTY_PRICES = json.dumps(
    {
        "format": 1,
        "prices": {"fused": {"seconds": {}, "median_error": 0, "largest_error": 0}},
    }
)


def total(prices: dict[str, float], sample: Sample, conditions: Conditions) -> float:
    """Seconds that the prices make of the sample's network."""
    amounts = features(sample.variant, conditions)
    return sum(prices[name] * n for name, n in zip(FEATURES, amounts, strict=True))


def price(sizes: tuple[float, float, int], conditions: Conditions, scale: float = 1.0) -> float:
    return scale * total(PRICES, Sample(*sizes, {}), conditions)


def samples(conditions: Conditions, noise: float = 0.0) -> list[Sample]:
    draws = numpy.random.default_rng(0)
    return [
        Sample(*sizes, {"fused": price(sizes, conditions) * (1 + noise * draws.standard_normal())})
        for sizes in NETWORKS
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Conditions:
    """Replaces measuring by the prices above, stock twice as dear."""

    def measure(variants, conditions, *, on_burst=None):
        plans = {"stock": 2.0, "fused": 1.0}
        sizes = [(v.depth, v.width, v.resolution) for v in variants]
        return [{p: price(size, conditions, f) for p, f in plans.items()} for size in sizes]

    monkeypatch.setattr(latency, "measure", measure)
    return Conditions(batch=2, plan="fused")


def test_prices_are_found_again() -> None:
    conditions = Conditions(batch=3)
    found = fit_prices(samples(conditions), conditions, "fused")
    assert found.seconds == pytest.approx(PRICES, rel=1e-6)
    assert found.largest_error < 1e-6


def test_one_disturbed_measurement_moves_little() -> None:
    conditions = Conditions()
    rows = samples(conditions, noise=0.01)
    rows[4] = replace(rows[4], seconds={"fused": 3 * rows[4].seconds["fused"]})
    found = fit_prices(rows, conditions, "fused")
    assert found.largest_error > 0.5  # it is reported
    errors = [
        abs(total(found.seconds, row, conditions) / price(sizes, conditions) - 1)
        for row, sizes in zip(rows, NETWORKS, strict=True)
    ]
    assert statistics.median(errors) < 0.05


def test_error_is_of_networks_that_the_fit_has_not_seen() -> None:
    """With noise, leave-one-out errors exceed those of the fit itself."""
    conditions = Conditions()
    rows = samples(conditions, noise=0.1)
    found = fit_prices(rows, conditions, "fused")
    fitted = [abs(total(found.seconds, row, conditions) / row.seconds["fused"] - 1) for row in rows]
    assert found.median_error > statistics.median(fitted)
    assert found.largest_error >= found.median_error > 0.01


def test_amounts_grow_with_phi() -> None:
    rule = CompoundScaling()
    rows = [features(rule.at(step / 7).variant, Conditions()) for step in range(-40, 60)]
    for small, large in itertools.pairwise(rows):
        assert all(a <= b for a, b in zip(small, large, strict=True))


def test_calibration(measured: Conditions) -> None:
    model = calibrate(measured)
    assert list(model.prices) == ["stock", "fused"]
    assert len(model.samples) == len(NETWORKS)
    expected = price((1.4, 1.8, 380), measured)
    network = custom_variant(depth=1.4, width=1.8, resolution=380)
    assert model.predict(network) == pytest.approx(expected, rel=1e-6)
    assert model.predict(network, "stock") == pytest.approx(2 * expected, rel=1e-6)
    assert model.versions["torch"] == torch.__version__
    assert model.threads == torch.get_num_threads()
    assert model.foreign() is None
    with pytest.raises(ValueError, match="plan 'lean' was not measured; measured are stock, fused"):
        model.predict(network, "lean")


def test_file_gives_the_model_again(measured: Conditions, tmp_path: Path) -> None:
    model = calibrate(measured)
    model.save(tmp_path / "calibration.json")
    assert LatencyModel.load(tmp_path / "calibration.json") == model


@pytest.mark.slow
def test_other_machines_are_named(measured: Conditions) -> None:
    model = replace(calibrate(measured), machine="a pocket calculator", versions={"torch": "1.0"})
    difference = model.foreign()
    assert "machine a pocket calculator, not " in difference
    assert f"torch 1.0, not {torch.__version__}" in difference
    threads = torch.get_num_threads()
    assert replace(calibrate(measured), threads=threads + 1).foreign() == (
        f"threads {threads + 1}, not {threads}"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no latency calibration"),
        ("[]", "no latency calibration"),
        ('{"format": 7}', "format 7 is not 1"),
        (EMPTY_PRICES, "prices must be of blocks"),
    ],
)
def test_bad_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        LatencyModel.load(path)


@pytest.mark.parametrize("amount", [-1.0, math.nan, math.inf, None, "1", True])
@pytest.mark.parametrize("key", ["blocks", "median_error"])
def test_numbers_of_a_file(key: str, amount: object, measured: Conditions, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate(measured).save(path)
    content = json.loads(path.read_text())
    prices = content["prices"]["stock"]
    (prices if key in prices else prices["seconds"])[key] = amount
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a number of at least 0"):
        LatencyModel.load(path)


@pytest.mark.parametrize(
    ("key", "value"), [("prices", {}), ("versions", None), ("threads", "x"), ("threads", None)]
)
def test_fields_of_a_file(key: str, value: object, measured: Conditions, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate(measured).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="no latency calibration"):
        LatencyModel.load(path)


def test_unknown_dtype_in_a_file(measured: Conditions, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibrate(measured).save(path)
    content = json.loads(path.read_text())
    content["conditions"]["dtype"] = "int3"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no latency calibration: 'int3'"):
        LatencyModel.load(path)


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plan 'lean' cannot be measured; allowed are stock"):
        calibrate(Conditions(training=True, plan="lean"))
    with monkeypatch.context() as patch:
        patch.setattr(latency, "can_run", lambda backend, op: "the extension is missing")
        with pytest.raises(ValueError, match="plan 'fused' cannot be measured: the extension"):
            calibrate(Conditions(plan="fused"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            calibrate(Conditions(device="cuda"))
    with pytest.raises(ValueError, match="3 samples are too few"):
        fit_prices(samples(Conditions())[:3], Conditions(), "fused")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_contestants_run_what_they_say(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan is timed in every round; the quickest burst counts."""
    monkeypatch.setattr(latency, "DISCARD_S", 0.0)
    monkeypatch.setattr(latency, "BURST_S", 0.0)
    seen = []

    def record(contestants, **options):
        times = timing.measure(contestants, **options)
        seen.append({plan: taken.median / 1e3 for plan, taken in times.items()})
        return times

    monkeypatch.setattr(latency, "timing", types.SimpleNamespace(measure=record))
    bursts = []
    conditions = Conditions(batch=2, training=training, plan="fused")
    variant = custom_variant(depth=0.1, width=0.2, resolution=32)
    (found,) = latency.measure([variant], conditions, on_burst=bursts.append)
    assert len(bursts) == latency.bursts(conditions, 1) == 2 * latency.ROUNDS
    assert found == {plan: min(row[plan] for row in seen) for plan in ("stock", "fused")}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_contestants_take_gradients_only_in_training(training: bool) -> None:
    variant = custom_variant(depth=0.1, width=0.2, resolution=32)
    calls = latency.contestants(variant, Conditions(batch=2, training=training, plan="fused"))
    assert list(calls) == ["stock", "fused"]
    steps = {}
    for plan, call in calls.items():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        steps[plan] = {event.key for event in record.key_averages()}
        assert any("Backward" in key for key in steps[plan]) == training
    assert "aten::convolution" in steps["stock"]
    assert not any(key.startswith("effnet_fast::") for key in steps["stock"])
    if training:
        assert any(key.startswith("effnet_fast::") for key in steps["fused"])
    else:  # the whole network in one call, which the profiler does not see
        assert "aten::convolution" not in steps["fused"]


def test_published_networks_are_predicted_in_order(measured: Conditions) -> None:
    model = calibrate(measured)
    for family in (list(VARIANTS)[:10], LITES):
        times = [model.predict(VARIANTS[name]) for name in family]
        assert times == sorted(times)
