"""Options and fixtures of every benchmark: which contests are held, and how.

pytest benchmarks --benchmark-only            each op, block and network once, on the CPU
pytest benchmarks --benchmark-only -m gpu     the same on the GPU
    --full      every contest and the compiled peers: hours
    --isa avx2  every contestant of a network held to AVX2
    --record    append what is found to benchmarks/results/<machine>.csv (or under --results)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import effnet_fast
import torchvision_cpu  # noqa: F401  (before any import of torchvision)
from benchmarks import held, limits, records, table
from benchmarks.contest import CLOCK, Contest, Outcome, Standing, hold
from benchmarks.params import require
from benchmarks.table import HELD, Held

Key = tuple[Any, ...]  # which contest a test belongs to
CONTESTANT = "contestant"  # the parameter of a test that is not part of its contest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effnet-fast benchmarks")
    group.addoption("--full", action="store_true", help="every contest, and the compiled peers")
    group.addoption("--isa", choices=held.ISAS, help="hold contests of networks to it (held.py)")
    group.addoption("--rounds", type=int, help="bursts of each contestant")
    group.addoption("--commit", help="what to record as the commit (default: git's)")
    group.addoption("--record", action="store_true", help="append the results to a CSV file")
    group.addoption("--results", type=Path, default=records.RESULTS, help="folder of the CSV files")


def pytest_configure(config: pytest.Config) -> None:
    """Finds out before hours of timing whether the results can be written.

    The table of this package replaces pytest-benchmark's own, which -v shows.
    """
    config.option.benchmark_quiet = True
    if isa := config.getoption("--isa"):
        try:
            held.hold(isa)
        except RuntimeError as error:
            raise pytest.UsageError(f"--isa: {error}") from error
    config.stash[HELD] = Held()
    if config.getoption("--record"):
        try:
            records.prepare(config.getoption("--results"))
        except OSError as error:
            raise pytest.UsageError(f"--results: {error}") from error


def pytest_report_header() -> str:
    """Which copy of the package is measured: an installed one before a tree without kernels."""
    return f"effnet-fast: {effnet_fast.__version__} in {effnet_fast.__path__[0]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives contests the clock that replays samples; what is marked full is left to --full."""
    for item in items:
        if CONTESTANT in _parameters(item):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    if not config.getoption("--full"):
        out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def pytest_make_parametrize_id(val: object) -> str | None:
    return getattr(val, "name", None)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a contest takes place."""
    require(request.param)
    return request.param


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the table."""
    held = config.stash[HELD]
    if held.rows or held.notes:
        terminalreporter.section("effnet-fast beside its peers")
        for line in table.lines(held, config.getoption("--full")):
            terminalreporter.write_line(line)


class Arena:
    """Holds each contest once, for all of its contestants' tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._held = config.stash[HELD]
        self._rounds = config.getoption("--rounds")
        self._commit = config.getoption("--commit")
        self._record = config.getoption("--record")
        self._results = config.getoption("--results")
        self._outcomes: dict[Key, Outcome | Exception] = {}

    def outcome(self, key: Key, build: Callable[[], Contest], names: list[str]) -> Outcome:
        """The contest's result; that of the last one is kept, so that its tensors can go."""
        if key not in self._outcomes:
            self._outcomes.clear()
            try:
                self._outcomes[key] = self._hold(build(), names)
            except Exception as error:  # every contestant's test fails with it, at once
                self._outcomes[key] = error
        found = self._outcomes[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _hold(self, contest: Contest, names: list[str]) -> Outcome:
        outcome = hold(contest, names, self._rounds)
        rows = records.rows_of(outcome, _limits(contest), self._commit)
        self._held.rows += rows
        self._held.absent |= outcome.absent
        if self._record:
            records.append(rows, self._results)
        return outcome


def _limits(contest: Contest) -> limits.Limits | None:
    """The machine's, or None with a warning: what was timed is worth keeping without them."""
    if contest.work is None:
        return None
    try:
        return limits.measure(contest.device)
    except RuntimeError as error:
        warnings.warn(f"no limits: {error}", stacklevel=2)
        return None


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config) -> Arena:
    return Arena(pytestconfig)


@functools.cache
def _selected(session: pytest.Session) -> dict[Key, list[str]]:
    """The contestants of each contest, among the tests that were selected."""
    chosen: dict[Key, list[str]] = {}
    for item in session.items:
        if CONTESTANT in _parameters(item):
            chosen.setdefault(_contest_key(item), []).append(_parameters(item)[CONTESTANT])
    return chosen


def _parameters(item: Any) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _contest_key(item: Any) -> Key:
    others = (f"{k}={v!r}" for k, v in _parameters(item).items() if k != CONTESTANT)
    return (item.path, item.originalname, *sorted(others))


@pytest.fixture
def enter(benchmark: Any, arena: Arena, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Lets a contestant take part in a contest, and hands its samples to pytest-benchmark.

    Called as enter(contestant, build, *arguments) where build(*arguments) makes the contest. The
    parity check comes first; where benchmarks are disabled it is all that runs.
    """

    def run(contestant: str, build: Callable[..., Contest], *arguments: object) -> None:
        if benchmark.disabled:
            build(*arguments).check()
            benchmark.pedantic(lambda: None)
            return
        key = _contest_key(request.node)
        names = _selected(request.session)[key]
        outcome = arena.outcome(key, lambda: build(*arguments), names)
        if contestant in outcome.absent:
            # The reason is the contestant's own: not installed, say, or no such dtype.
            pytest.skip(outcome.absent[contestant])
        standing = outcome.standings[contestant]
        benchmark.group = outcome.contest.name
        benchmark.extra_info.update(_extra(outcome.contest, contestant, standing))
        benchmark.pedantic(CLOCK.step, rounds=CLOCK.load(standing.timing.samples))

    return run


def _extra(contest: Contest, contestant: str, standing: Standing) -> dict[str, object]:
    machine = None if contestant in contest.yardsticks else _limits(contest)
    floor = machine.floor_s(contest.work, contest.dtype) * 1e3 if machine else None
    found = {
        "share of floor": floor and floor / standing.timing.median,
        "ratio to best peer": standing.ratio,
        "best peer": standing.best_peer,
        "peak memory, bytes": standing.peak_bytes,
    }
    return {name: value for name, value in found.items() if value is not None}
