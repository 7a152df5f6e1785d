"""Series of one dimension and of all, at equal work."""

from __future__ import annotations

import pytest
import torch

from effnet_fast.models import VARIANTS, Stage
from effnet_fast.scaling import CompoundScaling, Conditions, compare, count
from effnet_fast.scaling.series import FACTORS, SERIES

MACS = count(VARIANTS["b0"]).macs


@pytest.mark.slow
def test_series_scale_what_they_say() -> None:
    rows = compare(measured=False)
    assert [row.series for row in rows] == list(SERIES) * len(FACTORS)
    base = (1.0, 1.0, 224)
    for row in rows:
        variant = row.point.variant
        sizes = (variant.depth, variant.width, variant.resolution)
        changed = {
            name
            for name, size, b in zip(SERIES, sizes, base, strict=False)
            if size != pytest.approx(b, rel=0.02)
        }
        if row.series != "compound":
            assert changed <= {row.series}
        elif row.target_macs > MACS:
            assert changed == {"depth", "width", "resolution"}


def test_work_is_the_largest_below_the_target() -> None:
    for row in compare([3e8, 2e9], measured=False):
        assert row.counts.macs <= row.target_macs
        assert row.counts.macs > 0.75 * row.target_macs
        assert row.counts == count(row.point.variant)


def test_all_dimensions_are_estimated_to_be_better_than_one() -> None:
    rows = {row.series: row for row in compare([8 * MACS], measured=False)}
    assert max(rows, key=lambda name: rows[name].top1) == "compound"


def test_conditions_and_rule_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = Conditions(batch=2, dtype=torch.bfloat16, plan="stock")
    asked = []

    def measure(variants, given, *, on_burst=None):
        asked.append((len(variants), given))
        return [{"stock": 0.5}] * len(variants)

    monkeypatch.setattr("effnet_fast.scaling.series.measure", measure)
    rule = CompoundScaling(1.0, 1.0, 1.4)
    rows = compare([1e9], scaling=rule, conditions=conditions)
    assert asked == [(4, conditions)]
    assert {row.seconds["stock"] for row in rows} == {0.5}
    assert rows[-1].point.depth == 1.0
    assert rows[0].memory == conditions.memory(rows[0].point.variant)


def test_no_estimate_for_other_baselines() -> None:
    stages = (Stage(1, 3, 2, 16, 8, 1), Stage(4, 5, 2, 8, 16, 2))
    assert {row.top1 for row in compare([1e8], stages=stages, measured=False)} == {None}
