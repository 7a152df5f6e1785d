"""Results of benchmarks as they might be, for the tests of what is made of them."""

from __future__ import annotations

from benchmarks.contest import Contest, Outcome, Standing
from benchmarks.limits import Limits, Work
from effnet_fast.timing import Timing

LIMITS = Limits("cpu", {"fp32": 2e11, "bf16": 4e11}, 2e11, ((1000, 1e11), (10**9, 2e10)))


FAST = Timing(20.0, 18.0, 25.0, (18.0, 20.0, 25.0))


def outcome(case: str = "b0_224", what: str = "network") -> Outcome:
    """This package at 20 ms, torch at 40, 2 GFLOP and 1 MB of work."""
    contest = Contest(
        *(what, case, "inference", "fp32", "cpu", 1),
        build={},
        check=lambda: None,
        work=Work(bytes=1e6, dense_flops=2e9, other_flops=0.0, silus=0.0),
    )
    standings = {
        "effnet_fast": Standing(FAST, 5_000_000, "torch", 0.5),
        "torch": Standing(Timing(40.0, 39.0, 41.5, (39.0, 41.5)), None, "torch", 1.0),
    }
    return Outcome(contest, standings, {})
