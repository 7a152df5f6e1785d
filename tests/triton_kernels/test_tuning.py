"""The table of configurations: every row is whole, says where it comes from, and can be found."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("triton")

from effnet_fast.triton_kernels import tuning

SOURCE = re.compile(r"heuristic|measured\(.+, [0-9a-f]{7,40}\)")
NAMES = {"kernel", "device", "where", "config", "source"}


def test_rows_are_whole() -> None:
    for row in tuning.rows():
        assert set(row) == NAMES
        assert SOURCE.fullmatch(row["source"]), row["source"]
        assert (row["device"] is None) == (row["source"] == "heuristic")
        assert {"num_warps", "num_stages"} <= set(row["config"])
        assert all(low <= high for low, high in row["where"].values())


def test_tiles_are_powers_of_two() -> None:
    for row in tuning.rows():
        for name, value in row["config"].items():
            assert name == "num_stages" or value & (value - 1) == 0, row


def test_no_row_is_hidden_by_one_before_it() -> None:
    rows = tuning.rows()
    for at, row in enumerate(rows):
        for earlier in rows[:at]:
            if (earlier["kernel"], earlier["device"]) == (row["kernel"], row["device"]):
                assert not earlier["where"].items() <= row["where"].items(), row


def test_the_first_row_that_holds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(device: str | None, high: int, value: int) -> dict:
        return {"kernel": "k", "device": device, "where": {"m": [0, high]}, "config": {"B": value}}

    table = (row("other", 99, 1), row(None, 10, 2), row(None, 99, 3))
    monkeypatch.setattr(tuning, "rows", lambda: table)
    tuning._find.cache_clear()
    x = torch.empty(1)
    assert [tuning.config("k", x, m=m) for m in (0, 10, 11)] == [{"B": 2}, {"B": 2}, {"B": 3}]
    assert tuning._find("k", "other", (("m", 5),)) == {"B": 1}
    with pytest.raises(LookupError, match=r"no row for k with .*'m': 100"):
        tuning.config("k", x, m=100)
    tuning._find.cache_clear()


def test_the_table_is_data_beside_the_kernels() -> None:
    assert json.loads(tuning.FILE.read_text()) == list(tuning.rows())
