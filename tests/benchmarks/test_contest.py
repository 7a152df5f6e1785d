"""Contests: check first, alternate, compare with peers, replay the samples."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import contest as contests
from benchmarks.contest import Contest, Pace, ReplayClock, UnavailableError, hold


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    paces = dict.fromkeys(contests.PACES, Pace(3, 0.0, 0.0))
    monkeypatch.setattr(contests, "PACES", paces)


def _contest(log: list[str], **changes: object) -> Contest:
    def builder(name: str):
        return lambda: lambda: log.append(name)

    base = Contest(
        *("op", "case", "inference", "fp32", "cpu", 1),
        build={name: builder(name) for name in ("effnet_fast", "peer", "slow_peer", "part")},
        check=lambda: log.append("check"),
        yardsticks=frozenset(("part",)),
        measure_memory=False,
    )
    return replace(base, **changes)


def test_checks_before_anything_is_built() -> None:
    log: list[str] = []

    def red() -> None:
        log.append("check")
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        hold(_contest(log, check=red), ["effnet_fast", "peer"])
    assert log == ["check"]


def test_only_those_named_take_part_and_alternate() -> None:
    log: list[str] = []
    outcome = hold(_contest(log), ["effnet_fast", "peer"])
    a, b = "effnet_fast", "peer"
    assert log == ["check", a, b, *3 * [a], *6 * [b], *6 * [a], *3 * [b]]
    assert list(outcome.standings) == [a, b]
    assert outcome.standings[a].timing.calls == 6


def test_the_best_peer_is_neither_ours_nor_a_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = {"effnet_fast": 2.0, "peer": 4.0, "slow_peer": 8.0, "part": 1.0}
    times = {n: contests.timing.Timing(m, m, m, (m, m)) for n, m in medians.items()}
    monkeypatch.setattr(contests.timing, "measure", lambda ready, **options: times)
    outcome = hold(_contest([]), list(medians))
    assert {s.best_peer for s in outcome.standings.values()} == {"peer"}
    assert {n: s.ratio for n, s in outcome.standings.items()} == {
        n: m / 4.0 for n, m in medians.items()
    }


def test_without_a_peer_there_is_no_ratio() -> None:
    outcome = hold(_contest([]), ["effnet_fast", "part"])
    assert [(s.best_peer, s.ratio) for s in outcome.standings.values()] == [(None, None)] * 2


def test_who_cannot_take_part_says_why() -> None:
    def build() -> None:
        raise UnavailableError("not installed")

    contest = _contest([])
    contest = replace(contest, build={**contest.build, "peer": build})
    outcome = hold(contest, ["effnet_fast", "peer"])
    assert outcome.absent == {"peer": "not installed"}
    assert list(outcome.standings) == ["effnet_fast"]
    assert hold(contest, ["peer"]).standings == {}


def test_who_runs_out_of_memory_is_absent() -> None:
    def call() -> None:
        raise torch.OutOfMemoryError("too large")

    contest = _contest([])
    contest = replace(contest, build={**contest.build, "peer": lambda: call})
    outcome = hold(contest, ["effnet_fast", "peer"])
    assert outcome.absent == {"peer": "out of memory"}
    assert list(outcome.standings) == ["effnet_fast"]


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_thread_and_not_of_who_keeps_it() -> None:
    """What belongs to the main thread, like a workspace that the check has made, must count."""
    threads: list[threading.Thread] = []

    def call() -> torch.Tensor:
        threads.append(threading.current_thread())
        return torch.ones(2**24)

    build = dict.fromkeys(("effnet_fast", "peer"), lambda: call)
    contest = _contest([], build=build, measure_memory=True, keeps_memory=frozenset(("peer",)))
    standings = hold(contest, list(build)).standings
    assert threads[0] is not threading.main_thread()
    assert set(threads[1:]) == {threading.main_thread()}
    assert (standings["effnet_fast"].peak_bytes or 0) > 2**25
    assert standings["peer"].peak_bytes is None


def test_compiled_code_of_other_contests_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the compiler's limit of versions a peer would run uncompiled, and nobody would know."""
    log: list[str] = []
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    monkeypatch.setattr(torch.compiler, "reset", lambda: log.append("reset"))
    hold(_contest(log), ["peer"])
    assert log[:3] == ["check", "reset", "peer"]
    assert log.count("reset") == 1


def test_rounds_can_be_told() -> None:
    outcome = hold(_contest([]), ["peer"], rounds=7)
    assert outcome.standings["peer"].timing.calls == 14


def test_replay_gives_each_sample_once() -> None:
    clock = ReplayClock()
    assert clock.load((1.0, 250.0, 3.0)) == 3
    seen = []
    for _ in range(3):
        start = clock()
        clock.step()
        seen.append((clock() - start) * 1e3)
    assert seen == pytest.approx([1.0, 250.0, 3.0])
    with pytest.raises(IndexError):
        clock.step()


pytest_plugins = ["pytester"]
SUITE = """
import pytest
from benchmarks.contest import Contest

def contest(case):
    def check():
        with open("log", "a") as log:
            log.write(f"check {case}\\n")
        assert case != "red", "wrong numbers"
        if case == "broken":
            raise RuntimeError("no kernel")
    return Contest("op", case, "inference", "fp32", "cpu", 1,
                   build={name: lambda: lambda: None for name in ("effnet_fast", "torch")},
                   check=check)

@pytest.mark.parametrize("contestant", ["effnet_fast", "torch"])
@pytest.mark.parametrize(
    "case", ["green", "red", "broken", pytest.param("long", marks=pytest.mark.full)]
)
def test_op(enter, case, contestant):
    enter(contestant, contest, case)
"""


def _run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    root = Path(contests.__file__).parents[1]
    pytester.makepyfile(bench_op=SUITE)
    pytester.makeconftest((root / "benchmarks" / "conftest.py").read_text())
    pytester.makeini("[pytest]\npython_files = bench_*.py\nmarkers = full\n gpu\n")
    return pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider", *options)


@pytest.mark.slow
def test_suite_checks_once_and_stops_at_red(pytester: pytest.Pytester) -> None:
    result = _run(pytester, "--benchmark-only")
    result.assert_outcomes(passed=2, failed=4, deselected=2)
    result.stdout.fnmatch_lines(["*wrong numbers*", "*no kernel*"])
    result.stdout.fnmatch_lines(["op * green * inference *torch *"])
    assert (pytester.path / "log").read_text().splitlines() == [
        f"check {case}" for case in ("green", "red", "broken")
    ]


def test_disabled_benchmarks_still_check(pytester: pytest.Pytester) -> None:
    result = _run(pytester, "--benchmark-disable", "-k", "green")
    result.assert_outcomes(passed=2, deselected=6)
    assert (pytester.path / "log").read_text().splitlines() == ["check green"] * 2


@pytest.mark.slow
def test_records_only_when_told(pytester: pytest.Pytester) -> None:
    results = pytester.path / "results"
    options = ("--benchmark-only", "-k", "green", "--results", str(results))
    _run(pytester, *options, "--benchmark-json", "found.json")
    assert not results.exists()
    found = json.loads((pytester.path / "found.json").read_text())["benchmarks"]
    assert [f["extra_info"]["ratio to best peer"] for f in found][1] == 1.0
    _run(pytester, *options, "--record", "--commit", "abc")
    _run(pytester, *options, "--record", "--commit", "abc")
    [path] = results.glob("*.csv")
    assert len(path.read_text().splitlines()) == 1 + 2 * 2


def test_a_folder_that_cannot_be_written_is_found_out_first(pytester: pytest.Pytester) -> None:
    (pytester.path / "results").touch()
    result = _run(pytester, "--benchmark-only", "--record", "--results", "results")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert not (pytester.path / "log").exists()
