"""The report: the same CSV files give the same bytes, and only what may be published."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import growth, records, report
from benchmarks.records import ROOT, Row
from outcomes import LIMITS, outcome

README = f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n"


def _row(**changes: object) -> Row:
    return replace(records.rows_of(outcome(), LIMITS, "abc")[0], **changes)


def _series(name: str, cases: dict[str, float], **changes: object) -> list[Row]:
    return [
        _row(what=growth.WHAT + name, case=case, p50_ms=ms, gflops=1.0, gbytes=1.0, **changes)
        for case, ms in cases.items()
    ]


def _results(folder: Path) -> Path:
    rows = records.rows_of(outcome(), LIMITS, "abc")
    rows += records.rows_of(outcome("b0_c32_112_k3_s1", "dwconv_bn_silu"), LIMITS, "abc")
    rows += [replace(row, mode="training") for row in rows]
    rows += _series("resolution", {"b0_64": 1.0, "b0_128": 4.0, "b0_256": 16.0})
    rows = [replace(r, machine="Some CPU 2 threads", date="2026-01-01T00:00:00Z") for r in rows]
    records.append(rows, folder)
    return folder


def _main(folder: Path, *options: str) -> int:
    (folder / "README.md").touch()
    return report.main(["--results", str(folder / "results"), "--output", str(folder), *options])


@pytest.mark.exhaustive
def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    _results(tmp_path / "results")
    (tmp_path / "README.md").write_text(README)
    assert _main(tmp_path) == 0
    figures = {path.name for path in (tmp_path / "docs/figures").iterdir()}
    kinds = ("growth", "memory", "roofline", "throughput")
    assert figures == {f"some-cpu-2-threads-{kind}.svg" for kind in kinds}
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    command += ["--results", str(tmp_path / "results"), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.exhaustive
def test_check_finds_a_changed_figure_and_a_changed_table(tmp_path: Path) -> None:
    _results(tmp_path / "results")
    (tmp_path / "README.md").write_text(README)
    _main(tmp_path)
    for path in (tmp_path / "README.md", *(tmp_path / "docs/figures").iterdir()):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"20", b"19", 1))
        assert _main(tmp_path, "--check") == 1, path
        path.write_bytes(before)
    assert _main(tmp_path, "--check") == 0


@pytest.mark.slow
def test_what_is_checked_in_is_what_the_results_give() -> None:
    assert report.main(["--check"]) == 0


@pytest.mark.slow
def test_readme_keeps_the_rest(tmp_path: Path) -> None:
    _results(tmp_path / "results")
    (tmp_path / "README.md").write_text(README)
    _main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"# Title\n{report.BEGIN}\nSome CPU")
    assert text.endswith(f"{report.END}\nrest\n")
    assert "| B0 at 224 | inference | 1 | fp32 | 20 |" in text
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="the README has no part between"):
        _main(tmp_path)


def test_only_the_latest_run_with_peer_and_limit_is_published() -> None:
    old, new = _row(date="2026-01-01", p50_ms=1.0), _row(date="2026-02-01", p50_ms=2.0)
    assert report.published([old, new]) == [new]
    assert report.published([old, replace(new, ratio=None)]) == [old]
    assert report.published([old, replace(new, floor_share=None)]) == [old]
    full = [old, replace(old, contestant="openvino")]
    assert report.published([*full, new]) == full
    assert report.published([*full, new, replace(new, contestant="timm")])[0] == new
    other = replace(old, dtype="bf16")
    assert report.published([old, other, new]) == [other, new]


def test_growth_is_fitted_and_named() -> None:
    quadratic = {f"b0_{side}": side**2.5 / 1e4 for side in (64, 128, 256, 512)}
    rows = [
        replace(row, gflops=side**2.0, gbytes=side**2.45, peak_mb=side**2.0)
        for row, side in zip(_series("resolution", quadratic), (64, 128, 256, 512), strict=True)
    ]
    fit = growth.fit("resolution", "effnet_fast", rows)
    assert (fit.time, fit.flops, fit.bytes, fit.memory) == pytest.approx((2.5, 2.0, 2.45, 2.0))
    assert fit.spread == pytest.approx(1.0)
    assert fit.faster_than == ("FLOPs",)
    assert "| FLOPs |" in report.growth_table([fit])


def test_growth_with_phi_counts_doublings() -> None:
    rows = _series("phi", {f"phi{phi}_{224 + phi}": 2.0 ** (0.9 * phi) for phi in range(4)})
    assert growth.fit("phi", "effnet_fast", rows).time == pytest.approx(0.9)
    with pytest.raises(ValueError, match="needs three points"):
        growth.fit("phi", "effnet_fast", rows[:2])


def test_growth_with_batch() -> None:
    rows = [_row(what="growth with batch", batch=n, p50_ms=3.0 * n) for n in (1, 2, 4)]
    assert growth.fit("batch", "effnet_fast", rows).time == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (999.4, "999"), (999.6, "1000"), (12345.6, "12346")]
)
def test_figures_are_never_in_exponents(value: float, text: str) -> None:
    assert report.figure(value) == text
