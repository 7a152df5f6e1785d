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
            assert not hides(earlier, row), (earlier, row)


def hides(earlier: tuning.Row, row: tuning.Row) -> bool:
    """Whether all that `row` holds for is the earlier row's."""
    return (
        earlier["kernel"] == row["kernel"]
        and earlier["device"] in (None, row["device"])
        and all(
            name in row["where"] and low <= row["where"][name][0] and row["where"][name][1] <= high
            for name, (low, high) in earlier["where"].items()
        )
    )


@pytest.mark.parametrize(
    ("earlier", "row", "hidden"),
    [
        ((None, {}), (None, {"m": [0, 9]}), True),
        ((None, {"m": [0, 10]}), (None, {"m": [0, 9], "n": [1, 1]}), True),
        ((None, {"m": [0, 9]}), ("Device", {"m": [4, 8]}), True),
        (("Device", {"m": [0, 9]}), ("Device", {"m": [0, 9]}), True),
        (("Device", {}), (None, {"m": [4, 8]}), False),
        ((None, {"m": [1, 9]}), (None, {"m": [0, 9]}), False),
        ((None, {"m": [0, 9]}), (None, {"m": [0, 10]}), False),
        ((None, {"m": [0, 9], "n": [1, 1]}), (None, {"m": [0, 9]}), False),
    ],
)
def test_a_hidden_row_is_noticed(earlier: tuple, row: tuple, hidden: bool) -> None:
    one, other = ({"kernel": "k", "device": d, "where": w} for d, w in (earlier, row))
    assert hides(one, other) is hidden
    assert not hides(one, other | {"kernel": "another"})


def test_every_kernel_has_a_row_for_the_rest() -> None:
    """The last row of each kernel holds on every device, for every size."""
    last = {row["kernel"]: row for row in tuning.rows() if row["device"] is None}
    assert set(last) == {row["kernel"] for row in tuning.rows()}
    assert {kernel: row["where"] for kernel, row in last.items()} == {k: {} for k in last}


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
