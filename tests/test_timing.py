"""The timer: bursts, order and percentiles. No test here depends on how fast the machine is."""

import itertools
import time

import pytest

from effnet_fast import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a contestant says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def contestant(clock, log, name, *durations):
    turns = itertools.cycle(durations)

    def call():
        log.append(name)
        clock.now += next(turns)

    return call


def test_contestants_alternate_in_bursts_and_turn_round(clock):
    log = []
    contestants = {name: contestant(clock, log, name, 0.1) for name in "ab"}
    timing.measure(contestants, rounds=3, discard_s=0.15, burst_s=0.25)
    bursts = [(name, len(list(calls))) for name, calls in itertools.groupby(log)]
    # 2 discarded and 3 timed calls a burst; where the order turns, two bursts touch.
    assert bursts == [("a", 5), ("b", 10), ("a", 10), ("b", 5)]


def test_discarded_calls_are_not_timed(clock):
    times = timing.measure(
        {"a": contestant(clock, [], "a", 9.0, 0.1, 0.1, 0.1)}, rounds=2, discard_s=0, burst_s=0.25
    )
    assert times["a"].calls == 6
    assert [times["a"].p20, times["a"].median, times["a"].p80] == pytest.approx([100] * 3)


def test_slow_contestants_get_two_timed_calls(clock):
    times = timing.measure({"a": contestant(clock, [], "a", 5.0)}, rounds=3)
    assert times["a"].calls == 3 * timing.MIN_CALLS


def test_reports_each_burst(clock):
    seen = []
    timing.measure(
        {name: contestant(clock, [], name, 1.0) for name in "ab"}, rounds=2, on_burst=seen.append
    )
    assert seen == ["a", "b", "b", "a"]


def test_percentiles():
    samples = [float(i) for i in range(11)]
    assert timing.summarize(samples) == timing.Timing(5.0, 2.0, 8.0, tuple(samples))


def test_another_clock():
    """What takes the samples can be exchanged, for a device that is timed by its own events."""
    asked = []

    def call_for(function, seconds, at_least):
        asked.append((function(), seconds, at_least))
        return [7.0] * at_least

    times = timing.measure({"a": lambda: "a"}, rounds=2, burst_s=3.0, call_for=call_for)
    assert asked == 2 * [("a", 0.2, 1), ("a", 3.0, timing.MIN_CALLS)]
    assert times["a"].samples == 2 * timing.MIN_CALLS * (7.0,)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"discard_s": -1}, {"burst_s": -1}], ids=str)
def test_refuses_bad_options(options):
    with pytest.raises(ValueError, match="given rounds="):
        timing.measure({"a": time.time}, **options)


def test_refuses_no_contestant():
    with pytest.raises(ValueError, match="at least one contestant"):
        timing.measure({})
