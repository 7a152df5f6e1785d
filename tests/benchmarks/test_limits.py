"""Limits, floors and the work that is held against them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import limits, memory, work
from benchmarks.limits import Limits, Work
from cases import dwconv_of, head_of, mbconv_of, pointwise_of, squeeze_excite_of
from effnet_fast.models import VARIANTS
from effnet_fast.scaling import count
from shapes import shapes_of

# Rates of a two-core machine and the floors published for it, ms.
MACHINE = Limits("cpu", {"fp32": 235e9, "bf16": 470e9}, 235e9, ((1, 18.8e9),))
FLOORS = {
    ("b0", 224, 1): (3.9, 2.4),
    ("b0", 224, 8): (31.0, 19.6),
    ("b4", 380, 1): (42.0, 24.7),
    ("b7", 600, 1): (348.0, 196.0),
}


@pytest.mark.parametrize("network", FLOORS, ids=str)
def test_floors_of_networks(network: tuple[str, int, int]) -> None:
    size, side, batch = network
    for dtype, expected in zip(("fp32", "bf16"), FLOORS[network], strict=True):
        least = work.network(VARIANTS[size], side, batch, "inference", dtype)
        assert MACHINE.floor_s(least, dtype) * 1e3 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", ["b0", "b7"])
def test_network_is_the_sum_of_its_parts(size: str) -> None:
    """Operations of all ops beside the stem, the head and the classifier: all of the network's."""
    variant = VARIANTS[size]
    blocks = [work.mbconv(case, "inference", "fp32").flops for case in mbconv_of(size, batch=1)]
    shapes = shapes_of(size)
    edges = [
        2 * s.channels * s.out_channels * s.kernel**2 * s.out_size**2
        for s in (shapes.stem, shapes.head)
    ]
    squeezed = [4 * case.c * case.r for case in squeeze_excite_of(size, batch=1)]
    total = sum(blocks) + sum(edges) + sum(squeezed) + 2 * shapes.head.out_channels * 1000
    assert total == 2 * count(variant).macs
    ops = [work.dwconv(case, "inference", "fp32").flops for case in dwconv_of(size, batch=1)]
    ops += [work.pointwise(case, "inference", "fp32").flops for case in pointwise_of(size, batch=1)]
    assert sum(ops) == sum(blocks)
    assert [work.head(c, "inference", "fp32").flops for c in head_of(size, batch=1)] == edges[1:]


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert MACHINE.floor_s(Work(bytes=18.8e9), "fp32") == pytest.approx(1.0)
    assert MACHINE.floor_s(Work(bytes=1.0, dense_flops=235e9), "fp32") == pytest.approx(1.0)
    assert MACHINE.floor_s(Work(bytes=1.0, dense_flops=235e9), "bf16") == pytest.approx(0.5)
    assert MACHINE.floor_s(Work(bytes=1.0, other_flops=235e9), "bf16") == pytest.approx(1.0)
    assert MACHINE.floor_s(Work(bytes=1.0, dense_flops=235e9), "fp16") == pytest.approx(1.0)


def test_copy_rate_between_sizes() -> None:
    measured = Limits("cpu", {"fp32": 1.0}, 1.0, ((100, 8.0), (200, 4.0), (400, 2.0)))
    assert [measured.copy_rate(s) for s in (1, 100, 150, 400, 9999)] == [8.0, 8.0, 6.0, 2.0, 2.0]
    assert measured.memory_rate == 2.0


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_rates_are_measured_once() -> None:
    found = limits.measure("cpu")
    assert found is limits.measure("cpu")
    assert found.dense["bf16"] >= found.dense["fp32"] >= found.fma > 0
    assert all(rate > 0 for _, rate in found.copies)
    library = limits._library()
    assert library.run_fma(2, 2000) == 4 * library.run_fma(1, 1000) > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_another_processor_or_compiler_needs_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home folder may be shared by machines, and -march=native compiles for one of them."""
    paths = [limits._path(), limits._path()]
    monkeypatch.setattr(limits, "CPUINFO", tmp_path / "cpuinfo")
    for model, flags, clock in ((1, "fpu", 1), (1, "fpu", 2), (2, "fpu", 2), (2, "fpu avx", 2)):
        text = f"model name : {model}\nflags : {flags}\ncpu MHz : {clock}\n"
        (tmp_path / "cpuinfo").write_text(text)
        paths.append(limits._path())
    run = limits._run
    monkeypatch.setattr(limits, "_run", lambda *command: run(*command) + b"another")
    paths.append(limits._path())
    assert [paths.index(path) for path in paths] == [0, 0, 2, 2, 4, 5, 6]


def test_without_a_compiler_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"g\+\+ is needed"):
        limits._library()


@pytest.mark.slow
def test_peak_memory_of_a_call() -> None:
    size = 64 * 2**20
    for _ in range(2):  # what the first call freed must count again
        peak = memory.peak_bytes(lambda: torch.ones(size // 4).sum(), "cpu")
        assert peak is not None
        assert 0.98 * size <= peak <= 1.1 * size  # threads count their pages in batches
    assert (memory.peak_bytes(lambda: None, "cpu") or 0) < 2**20
