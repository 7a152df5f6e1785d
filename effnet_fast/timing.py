"""Times several functions side by side on a CPU that others share.

Threads of some engines go on spinning after a call, so strict turns slow the neighbours down
(seen: twofold). The contestants therefore alternate in bursts: each burst first discards calls
until the machine has settled, then times calls one by one. The order turns round every round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_CALLS = 2  # timed calls per burst, however long one takes
CallFor = Callable[[Callable[[], object], float, int], list[float]]


@dataclass(frozen=True)
class Timing:
    """What one contestant took per call, milliseconds over all rounds."""

    median: float
    p20: float  # the 20th percentile
    p80: float  # the 80th percentile
    samples: tuple[float, ...]  # every timed call, in order

    @property
    def calls(self) -> int:
        """Number of timed calls."""
        return len(self.samples)


def measure(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    discard_s: float = 0.2,
    burst_s: float = 0.4,
    on_burst: Callable[[str], None] | None = None,
    call_for: CallFor | None = None,
) -> dict[str, Timing]:
    """Times every contestant in alternating bursts.

    Args:
        contestants: functions to call, by name; each call must have finished when it returns.
        rounds: number of bursts of each contestant.
        discard_s: seconds of untimed calls (at least one) that open a burst.
        burst_s: seconds of timed calls (at least two) in a burst.
        on_burst: called with the contestant's name after each burst, for a progress bar.
        call_for: calls a function for some seconds and at least some times, and returns what each
            call took, ms; None means by the clock of the CPU.

    Returns:
        one `Timing` per contestant, in the order given.

    Raises:
        ValueError: no contestant, rounds below 1, or a negative duration.
    """
    if not contestants:
        raise ValueError("measure needs at least one contestant")
    if rounds < 1 or discard_s < 0 or burst_s < 0:
        raise ValueError(
            f"rounds must be at least 1 and durations at least 0, given rounds={rounds}, "
            f"discard_s={discard_s}, burst_s={burst_s}"
        )
    call_for = call_for or call_for_seconds
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            call_for(contestants[name], discard_s, 1)
            samples[name] += call_for(contestants[name], burst_s, MIN_CALLS)
            if on_burst is not None:
                on_burst(name)
    return {name: summarize(samples[name]) for name in names}


def summarize(samples_ms: list[float]) -> Timing:
    """Median and percentiles of at least two samples, linearly interpolated."""
    p20, *_, p80 = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Timing(statistics.median(samples_ms), p20, p80, tuple(samples_ms))


def call_for_seconds(function: Callable[[], object], seconds: float, at_least: int) -> list[float]:
    """Calls until the time is up and at least so often; the duration of each call, ms."""
    durations: list[float] = []
    start = now = time.perf_counter()
    while now - start < seconds or len(durations) < at_least:
        before = now
        function()
        now = time.perf_counter()
        durations.append((now - before) * 1e3)
    return durations
