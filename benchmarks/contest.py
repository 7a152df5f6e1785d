"""Contests: several ways of computing one thing, checked, then timed side by side.

A contest checks this package's result first and is called off when that is wrong. Its contestants
then alternate in bursts (effnet_fast/timing.py), all of them whom pytest has selected, and every
contestant's samples go to the pytest-benchmark fixture of its own test through a clock that replays
them. On a GPU a sample is the device's own time between two events, with the L2 cache flushed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks import device_clock
from benchmarks.limits import Work
from benchmarks.memory import peak_bytes
from effnet_fast import timing

OURS = "effnet_fast"  # contestants of this package begin with this
Contestant = Callable[[], object]


class UnavailableError(Exception):
    """A contestant cannot run here; the text is the reason."""


@dataclass(frozen=True)
class Contest:
    """One thing to compute, and who computes it.

    Args:
        what: "dwconv_bn_silu", "network" and so on.
        case: which shape or network.
        mode: "inference" or "training".
        dtype: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
        batch: images in a call.
        build: by name, makes the function that is timed, or raises UnavailableError.
        check: raises AssertionError where this package's result is wrong.
        work: what has to be done at the least; None where that has no meaning.
        yardsticks: contestants that compute less than the others, and are no peers.
        measure_memory: whether peak memory says anything.
        keeps_memory: contestants of which it does not, since they keep what they take.
        engines: whether contestants have threads of their own, which spin on after a call: bursts
            then discard calls for longer.
        rounds: bursts of each contestant, where calls take seconds.
        clock: takes the place of the CPU's clock, as `timing.measure` has it.
    """

    what: str
    case: str
    mode: str
    dtype: str
    device: str
    batch: int
    build: Mapping[str, Callable[[], Contestant]]
    check: Callable[[], None] = field(compare=False)
    work: Work | None = None
    yardsticks: frozenset[str] = frozenset()
    measure_memory: bool = True
    keeps_memory: frozenset[str] = frozenset()
    engines: bool = False
    rounds: int | None = None
    clock: timing.CallFor | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What, case, mode, dtype, device and batch in one line: the key of the contest."""
        return f"{self.what} {self.case} {self.mode} {self.dtype} {self.device} batch {self.batch}"


@dataclass(frozen=True)
class Standing:
    """What a contest found of one contestant.

    Args:
        timing: its samples, ms.
        peak_bytes: of its first call, or None where that cannot be told.
        best_peer: the fastest contestant that is not this package's, itself where it is that.
        ratio: its median over the best peer's, None where there is no peer.
    """

    timing: timing.Timing
    peak_bytes: int | None
    best_peer: str | None
    ratio: float | None


@dataclass(frozen=True)
class Outcome:
    """A contest's result: standings, and why the others did not take part."""

    contest: Contest
    standings: dict[str, Standing]
    absent: dict[str, str]


@dataclass(frozen=True)
class Pace:
    """How long contestants run: as `timing.measure` takes it."""

    rounds: int
    discard_s: float
    burst_s: float


PACES = {False: Pace(12, 0.03, 0.07), True: Pace(5, 0.2, 0.4)}  # by whether they are engines


def hold(contest: Contest, names: list[str], rounds: int | None = None) -> Outcome:
    """Checks, builds and times the contestants of these names.

    One that runs out of memory is absent.

    Args:
        contest: what is held.
        names: who takes part.
        rounds: bursts of each contestant; None means the contest's own number.

    Raises:
        AssertionError: this package computes something else than it should; nothing is timed.
    """
    contest.check()
    if "torch._dynamo" in sys.modules:
        # Other contests' compiled code would count against the compiler's limit, beyond which it
        # runs things as they are, and make it compile for all shapes.
        torch.compiler.reset()
    ready: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    for name in names:
        try:
            function = contest.build[name]()
            if contest.measure_memory and name not in contest.keeps_memory:
                peaks[name] = peak_bytes(function, contest.device)
            else:
                function()
            ready[name] = function
        except UnavailableError as error:
            absent[name] = str(error)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
    if not ready:
        return Outcome(contest, {}, absent)
    pace = PACES[contest.engines]
    times = timing.measure(
        ready,
        rounds=rounds or contest.rounds or pace.rounds,
        discard_s=pace.discard_s,
        burst_s=pace.burst_s,
        call_for=device_clock.call_for if contest.device == "cuda" else contest.clock,
    )
    peers = [n for n in times if not n.startswith(OURS) and n not in contest.yardsticks]
    best = min(peers, key=lambda n: times[n].median, default=None)
    standings = {
        name: Standing(
            timing=time,
            peak_bytes=peaks.get(name),
            best_peer=best,
            ratio=time.median / times[best].median if best else None,
        )
        for name, time in times.items()
    }
    return Outcome(contest, standings, absent)


class ReplayClock:
    """A clock that moves only when `step` is called, by the next of the samples it was given.

    pytest-benchmark takes its time from the clock that it is told to use, so timing `step` by this
    clock gives it samples that were taken elsewhere.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: list[float] = []

    def load(self, samples_ms: tuple[float, ...]) -> int:
        """Gives the clock its samples; returns how many there are."""
        self._samples = [ms * 1e-3 for ms in reversed(samples_ms)]
        return len(samples_ms)

    def __call__(self) -> float:
        return self._now

    def step(self) -> None:
        """Lets the next sample's time pass."""
        self._now += self._samples.pop()


CLOCK = ReplayClock()
