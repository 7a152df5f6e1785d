"""Whole networks: this package against every other way of running them.

`pytest benchmarks/bench_network.py --benchmark-only`. Weights are random with calibrated BN
statistics, the same for all contestants; those who compute other numbers do not take part. A
training step is forward, cross entropy and backward, without an optimizer.
"""

from __future__ import annotations

import pytest

from benchmarks import network_contests as networks

COLUMNS = ("case", "dtype", "device", "contestant")


@pytest.mark.parametrize(COLUMNS, networks.entries("inference"))
def test_inference(enter, case: networks.Case, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, networks.contest, case, "inference", dtype, device)


@pytest.mark.parametrize(COLUMNS, networks.entries("training"))
def test_training_step(
    enter, case: networks.Case, dtype: str, device: str, contestant: str
) -> None:
    enter(contestant, networks.contest, case, "training", dtype, device)
