"""A share of the drawn edits of `make reliability`, and that it notices what it is there for."""

from __future__ import annotations

import pytest

import drawn_edits
import edit_kinds
from effnet_fast.inference.snapshot import Snapshot
from effnet_fast.modules import observed
from effnet_fast.modules.stock import Stock

SHARE = 250  # edits, about half a minute


@pytest.mark.slow
def test_a_share() -> None:
    counts = drawn_edits.work(50_000, SHARE)
    assert counts.failures == []
    assert len(counts.kinds) > 40
    assert counts.planned > 0.2 * counts.calls
    assert counts.deployed > 0.2 * (counts.deployed + counts.refused)


FAULTS = {
    "stale": (Snapshot, "is_fresh", lambda self, model: True, ("in_place", "hook")),
    "replaced": (Stock, "replaced", lambda self: None, ("class", "function")),
    "mode": (observed, "is_intercepted", lambda: False, ("mode",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, value, kinds = FAULTS[name]
    monkeypatch.setattr(owner, attribute, value)
    assert drawn_edits.work(0, 20, kinds).failures


def test_there_are_many_kinds() -> None:
    assert len(edit_kinds.KINDS) >= 40
