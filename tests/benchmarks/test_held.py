"""Contests held to an instruction set: who takes part, and that its own numbers are checked."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks import held, records, report
from benchmarks import network_contests as networks
from benchmarks.contest import UnavailableError
from effnet_fast.backends import can_run
from outcomes import LIMITS, outcome

SMALL = networks.Case("b0", 1, 64)


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_chosen", ["avx2"])


@pytest.mark.usefixtures("avx2")
def test_what_cannot_be_held_does_not_take_part() -> None:
    contest = networks.contest(SMALL, "inference", "fp32", "cpu", names=["onnxruntime", "timm"])
    assert contest.what == "network_avx2"
    assert contest.work is None
    for build in contest.build.values():
        with pytest.raises(UnavailableError, match=r"nothing holds it to avx2|not installed"):
            build()


@pytest.mark.slow
@pytest.mark.usefixtures("avx2")
def test_this_package_runs_its_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := can_run("cpu:avx2", "dwconv_bn_silu"):
        pytest.skip(reason)
    contest = networks.contest(SMALL, "inference", "fp32", "cpu", names=["effnet_fast"])
    contest.check()
    result = contest.build["effnet_fast"]()()
    monkeypatch.setattr(held, "backend", lambda: "cpu:generic")
    other = networks.contest(SMALL, "inference", "fp32", "cpu", names=["effnet_fast"])
    assert not other.build["effnet_fast"]()().equal(result)


@pytest.mark.usefixtures("avx2")
def test_an_engine_with_newer_kernels_is_refused() -> None:
    held.require(["brgconv_avx2_1x1_f32", "unknown_f32"])
    with pytest.raises(
        UnavailableError, match="runs brgconv_avx512_f32, though it is held to AVX2"
    ):
        held.require(["brgconv_avx2_1x1_f32", "brgconv_avx512_f32"])


def test_free_engines_run_what_they_like() -> None:
    held.require(["brgconv_avx512_f32"])
    assert (held.what("network"), held.backend()) == ("network", "auto")


def test_holding_comes_before_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in held.ISAS["avx2"].environment:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(held, "_chosen", [])
    monkeypatch.setitem(sys.modules, "openvino", sys)
    with pytest.raises(RuntimeError, match="too late to hold engines to avx2"):
        held.hold("avx2")
    assert held.isa() == ""


def test_the_report_has_a_table_without_limits() -> None:
    free = records.rows_of(outcome(), LIMITS, "abc")
    limited = {"floor_ms": None, "floor_share": None, "limit_fma_gflops": None}
    rows = [*free, *(replace(row, what="network_avx2", commit="def", **limited) for row in free)]
    assert report.published(rows) == rows
    text = report.page("Some CPU", rows, [])
    assert "### Networks, inference, held to AVX2" in text
    assert "Commits def." in text
    assert report.conditions(rows) == report.conditions(free)
    assert report.summary(rows) == report.summary(free)
