"""Contests of single passes, on the CPU: parity, and that every contestant runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cuda_contests, op_contests, pass_contests
from benchmarks.contest import OURS
from cases import DwconvCase, SqueezeExciteCase
from parity import NEEDS_SIMT

CASE = SqueezeExciteCase("b0_small", 2, 24, 9, 8, 6)


@NEEDS_SIMT
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["squeeze", "finish", "bn_sums"])
def test_passes(what: str, dtype: str) -> None:
    contest = getattr(pass_contests, what)(CASE, dtype, "cpu")
    contest.check()
    ours, theirs = (contest.build[name]()() for name in (OURS, op_contests.STOCK))
    assert [t.shape for t in ours] == [t.shape for t in theirs]


@NEEDS_SIMT
def test_a_wrong_pass_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = pass_contests.finish(CASE, "fp32", "cpu")
    right = pass_contests.depthwise.bn_act
    monkeypatch.setattr(
        pass_contests.depthwise, "bn_act", lambda *a, **k: right(*a, **k | {"keep": None})
    )
    with pytest.raises(AssertionError, match="error"):
        contest.check()


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", ["dwconv", "squeeze_excite"])
def test_compiled_backward(op: str) -> None:
    """A compiled peer's gradients can be taken again and again, and are stock's."""
    case = DwconvCase("b0_small", 2, 8, 9, 8, 3) if op == "dwconv" else CASE
    contest = getattr(cuda_contests, f"{op}_backward")(case, "training", "fp32", "cpu")
    names = {OURS, op_contests.STOCK, op_contests.COMPILED, cuda_contests.NATIVE}
    assert contest.build.keys() == names
    stock = contest.build[op_contests.STOCK]()()
    compiled = contest.build[op_contests.COMPILED]()
    for _ in range(3):
        for a, b in zip(compiled(), stock, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
