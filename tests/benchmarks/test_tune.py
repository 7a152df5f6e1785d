"""The tool that refreshes the tuning table: choosing, and writing rows; measuring needs a GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from effnet_fast.triton_kernels import launching, tuning

SIZES = (("bytes", 2), ("m", 1000))
KEY = ("bn_act", SIZES)


def test_the_quickest_is_chosen_and_noise_is_not() -> None:
    default = {KEY: 1.0, ("squeeze", SIZES): 1.0}
    slow, quick, quicker = {"BP": 1}, {"BP": 2}, {"BP": 3}
    candidates = [
        ("bn_act", slow, {KEY: 0.99}),
        ("bn_act", quick, {KEY: 0.9}),
        ("bn_act", quicker, {KEY: 0.89}),
        ("bn_act", slow, {KEY: 0.95, ("squeeze", SIZES): 0.1}),  # another kernel's override
    ]
    assert tune.best(default, candidates) == {KEY: quicker}


def test_rows_go_in_front_and_replace_their_own(tmp_path: Path) -> None:
    table = tmp_path / "tuning.json"
    first = tune.rows_of({KEY: {"BP": 1}}, "Device", "0123456")
    assert first[0]["where"] == {"bytes": [2, 2], "m": [500, 2000]}
    tune.write(table, first)  # beside the package's rows, where the file is not there yet
    assert json.loads(table.read_text()) == [*first, *tuning.rows()]
    second = tune.rows_of({KEY: {"BP": 2}}, "Device", "abcdef0")
    tune.write(table, second)
    assert json.loads(table.read_text()) == [*second, *tuning.rows()]
    assert second[0]["source"] == "measured(Device, abcdef0)"


def test_launches_are_watched_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch after a kernel's configuration is that kernel's; folds have none."""
    started = []
    monkeypatch.setattr(launching, "start", lambda *args: started.append(args))
    x, ticks = torch.empty(0, 8, 3, 3), itertools.count()
    override = {"bn_act": {"BP": 7}}
    with tune.watched(override, lambda: next(ticks)) as seen:
        assert tuning.config("bn_act", x, c=8) == {"BP": 7}
        launching.start("kernel")
        launching.start("fold")
        assert tuning.config("bn_sums", x, c=8, m=1) != {"BP": 7}
        launching.start("sums")
    assert [(key[0], begin, end) for key, begin, end in seen] == [
        ("bn_act", 0, 1),
        ("bn_sums", 3, 4),
    ]
    assert len(started) == 3
    assert tuning.config("bn_act", x, c=8) != {"BP": 7}


def test_candidates_are_of_the_tables_kernels() -> None:
    """Each candidate names what the table's rows of its kernel name."""
    for kernel, configs in tune.CANDIDATES.items():
        rows = [row for row in tuning.rows() if row["kernel"] == kernel]
        assert rows
        assert {frozenset(c) for c in configs} == {frozenset(row["config"]) for row in rows}


def test_without_a_gpu_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tuning.FILE.read_bytes()
    assert tune.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert tuning.FILE.read_bytes() == before
