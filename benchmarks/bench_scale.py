"""What compound scaling costs, each figure with its target, and how well it predicts times.

`pytest benchmarks/bench_scale.py --benchmark-only`
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import table, targets
from benchmarks.contest import OURS, Contest
from effnet_fast.models import custom_variant
from effnet_fast.scaling import (
    CompoundScaling,
    Conditions,
    count,
    count_memory,
    fit,
    latency,
)
from effnet_fast.scaling.latency import FEATURES, NETWORKS, Sample, features, fit_prices

ARGUMENTS = ("scale", "fit", "--macs", "1G", "--params", "10M", "--memory", "8GiB", "--json")
# Networks that no price is fitted to: depth, width, resolution.
HELD_OUT = (
    *((0.8, 1.1, 176), (1.1, 0.8, 192), (1.8, 1.3, 288), (0.5, 0.5, 136), (1.1, 1.0, 240)),
    *((0.9, 0.9, 168), (0.6, 0.7, 120), (1.3, 0.9, 216), (0.7, 1.2, 144)),
)


def command() -> None:
    """From the start of the process to the answer."""
    argv = [sys.executable, "-m", "effnet_fast.cli", *ARGUMENTS]
    subprocess.run(argv, check=True, capture_output=True)


def search() -> None:
    fit(target_macs=5e9, target_params=3e7, target_memory=1e9, batch=4)


def hundred_points() -> None:
    scaling = CompoundScaling()
    for step in range(100):
        variant = scaling.at(step / 12).variant
        count(variant)
        count_memory(variant, "inference", "fused")
        count_memory(variant, "training", "fused")


CASES: dict[str, Callable[[], None]] = {
    "command": command,
    "fit": search,
    "hundred_points": hundred_points,
}


def _contest(name: str) -> Contest:
    return Contest(
        *("scale", name, "inference", "fp32", "cpu", 0),
        build={OURS: lambda: CASES[name]},
        check=lambda: None,
        measure_memory=False,
        rounds=2,
    )


@pytest.mark.parametrize("contestant", [OURS])
@pytest.mark.parametrize("name", CASES)
def test_scale(enter, name: str, contestant: str) -> None:
    enter(contestant, _contest, name)


@pytest.mark.full
def test_prediction_of_held_out_networks(benchmark: Any, pytestconfig: pytest.Config) -> None:
    """All are measured in the same rounds: on a shared machine, minutes differ by a factor."""
    conditions = Conditions(plan="fused")
    sizes = [*NETWORKS, *HELD_OUT]
    random.Random(0).shuffle(sizes)  # so that a busy spell hits both kinds
    variants = [custom_variant(depth=d, width=w, resolution=side) for d, w, side in sizes]
    times = benchmark.pedantic(latency.measure, (variants, conditions), rounds=1)
    measured = dict(zip(sizes, times, strict=True))
    rows = [Sample(*size, measured[size]) for size in (*NETWORKS, *HELD_OUT)]
    for plan in ("stock", "fused"):
        prices = fit_prices(rows[: len(NETWORKS)], conditions, plan).seconds
        errors = [
            abs(_total(prices, row, conditions) / row.seconds[plan] - 1)
            for row in rows[len(NETWORKS) :]
        ]
        median = statistics.median(errors)
        benchmark.extra_info[f"median error, {plan}"] = median
        pytestconfig.stash[table.HELD].notes.append(
            f"Predicted times, {plan}: median error {median:.1%}, worst {max(errors):.1%}; "
            f"the target is a median of {targets.PREDICTION_ERROR:.0%}"
        )


def _total(prices: dict[str, float], sample: Sample, conditions: Conditions) -> float:
    amounts = features(sample.variant, conditions)
    return sum(prices[name] * n for name, n in zip(FEATURES, amounts, strict=True))
