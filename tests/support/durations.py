"""A plugin of pytest that writes what every test costs, as tests/durations.csv records it.

    pytest -p durations --costs FILE ...

Costs are processor seconds of the test and of the processes that it starts, so that other work on
the machine counts little. The file has a line for each function and tier that takes LEAST_S.
"""

from __future__ import annotations

import collections
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_costs: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
LEAST_S = 1.0  # of a function in the table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", type=Path, required=True, help="the CSV file to write")


def _seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _tier(item: pytest.Item) -> str:
    return next((t for t in ("gpu", "exhaustive", "slow") if item.get_closest_marker(t)), "quick")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _seconds()
    result = yield
    file, _, name = item.nodeid.partition("::")
    row = _costs[file, name.partition("[")[0], _tier(item)]
    row[0] += 1
    row[1] += _seconds() - before
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: takes over what a worker has counted."""
    for key, (tests, seconds) in node.workeroutput.get("costs", {}).items():
        row = _costs[tuple(key.split("|"))]
        row[0] += tests
        row[1] += seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["costs"] = {"|".join(k): row for k, row in _costs.items()}
        return
    rows = sorted(_costs.items(), key=lambda row: -row[1][1])
    with session.config.getoption("--costs").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "function", "tier", "tests", "seconds"))
        writer.writerows(
            (*key, int(tests), f"{seconds:.1f}")
            for key, (tests, seconds) in rows
            if seconds >= LEAST_S
        )
