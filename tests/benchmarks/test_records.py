"""The CSV files: append-only, read back as written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.records import Row
from outcomes import LIMITS, outcome


def test_rows_hold_ratio_floor_and_conditions() -> None:
    ours, peer = records.rows_of(outcome(), LIMITS, "abc123")
    assert (ours.contestant, ours.p20_ms, ours.p50_ms, ours.p80_ms, ours.calls) == (
        *("effnet_fast", 18.0, 20.0, 25.0),
        3,
    )
    assert (ours.ratio, ours.best_peer, ours.peak_mb, peer.peak_mb) == (0.5, "torch", 5.0, None)
    assert ours.floor_ms == pytest.approx(10.0)  # 2 GFLOP at 200 GFLOP/s
    assert ours.floor_share == pytest.approx(0.5)
    assert ours.commit == "abc123"
    assert ours.torch
    assert ours.machine.endswith("threads")
    assert ours.date == peer.date


def test_read_back_and_appended(tmp_path: Path) -> None:
    rows = records.rows_of(outcome(), LIMITS, "abc")
    records.append(rows, tmp_path)
    [path] = tmp_path.glob("*.csv")
    before = path.read_bytes()
    assert records.read(path) == rows
    records.append(rows, tmp_path)
    assert path.read_bytes().startswith(before)
    assert records.read(path) == rows + rows


def test_absent_figures_stay_absent(tmp_path: Path) -> None:
    [row, _] = records.rows_of(outcome(), None, "")
    assert (row.floor_ms, row.floor_share, row.limit_fma_gflops) == (None, None, None)
    records.append([row], tmp_path)
    [path] = tmp_path.glob("*.csv")
    assert records.read(path) == [row]


def test_another_header_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    row = records.rows_of(outcome(), LIMITS, "")[0]
    path = tmp_path / f"{records.slug(row.machine)}.csv"
    path.write_text("date,what\n2020,x\n")
    with pytest.raises(ValueError, match="has the columns"):
        records.append([row], tmp_path)
    assert path.read_text() == "date,what\n2020,x\n"
    with pytest.raises(ValueError, match="has the columns"):
        records.read(path)


def test_a_bad_cell_is_named(tmp_path: Path) -> None:
    records.append(records.rows_of(outcome(), LIMITS, ""), tmp_path)
    [path] = tmp_path.glob("*.csv")
    path.write_text(path.read_text().replace(",20,", ",twenty,"))
    with pytest.raises(ValueError, match=r":2: p50_ms is 'twenty', not float"):
        records.read(path)


def test_figures_have_five_digits(tmp_path: Path) -> None:
    row: Row = replace(records.rows_of(outcome(), LIMITS, "")[0], p50_ms=12.3456789)
    records.append([row], tmp_path)
    [path] = tmp_path.glob("*.csv")
    assert records.read(path)[0].p50_ms == 12.346


def test_what_computes_a_part_has_no_share_of_the_whole() -> None:
    found = outcome()
    found = replace(found, contest=replace(found.contest, yardsticks=frozenset(("torch",))))
    assert [row.floor_share is None for row in records.rows_of(found, LIMITS, "")] == [False, True]


def test_rows_of_a_run_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = records.rows_of(outcome(), LIMITS, "abc")
    records.append(rows, tmp_path)
    [path] = tmp_path.glob("*.csv")
    before = path.read_bytes()
    cells = iter(range(3 * len(records.FIELDS) // 2))  # fails in the middle of the second row

    def cell(value: object) -> str:
        if next(cells, None) is None:
            raise KeyboardInterrupt
        return str(value)

    monkeypatch.setattr(records, "_cell", cell)
    with pytest.raises(KeyboardInterrupt):
        records.append(rows, tmp_path)
    assert path.read_bytes() == before


def test_slug() -> None:
    assert records.slug("NVIDIA H100 80GB (HBM3)") == "nvidia-h100-80gb-hbm3"
