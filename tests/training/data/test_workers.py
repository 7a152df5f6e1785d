"""Worker processes: order, errors, and their end with the parent's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from effnet_fast.training.data.workers import Workers

LIMIT_S = 600.0  # for a test that would never end


def late(number: int) -> tuple[int, int]:
    """Early tasks take longer than later ones."""
    time.sleep(0.02 * (number % 3 == 0))
    return number, os.getpid()


def one_thread(_: int) -> tuple[int, float]:
    return torch.get_num_threads(), float((torch.ones(500, 500) @ torch.ones(500, 500)).sum())


def fail(number: int) -> int:
    if number == 3:
        raise ValueError("number 3 is not wanted")
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_order(count):
    with Workers(late, count, forks=True) as workers:
        results = list(workers.map(range(30)))
    assert [number for number, _ in results] == list(range(30))
    processes = {process for _, process in results}
    assert len(processes) == max(1, count)
    assert (os.getpid() in processes) == (count == 0)


def test_tasks_are_taken_as_they_are_needed():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    with Workers(late, 2, forks=True) as workers:
        results = workers.map(tasks())
        for _ in range(5):
            next(results)
        assert len(taken) < 30


def test_large_tasks_and_results_do_not_block():
    with Workers(bytes.upper, 2, forks=True) as workers:
        results = list(workers.map(b"x" * 2_000_000 for _ in range(8)))
    assert [len(result) for result in results] == [2_000_000] * 8
    assert results[0][:1] == b"X"


def test_one_thread_each_after_the_parent_had_more():
    torch.set_num_threads(2)
    one_thread(0)  # starts the parent's threads, which a fork does not copy
    with Workers(one_thread, 2, forks=True) as workers:
        assert list(workers.map(range(4))) == [(1, 500.0**3)] * 4


def test_errors_reach_the_caller():
    with (
        Workers(fail, 2, forks=True) as workers,
        pytest.raises(ValueError, match="number 3 is not wanted"),
    ):
        list(workers.map(range(8)))


def test_a_killed_worker_is_told():
    with (
        Workers(die, 2, forks=True) as workers,
        pytest.raises(RuntimeError, match="ended by SIGKILL"),
    ):
        list(workers.map(range(8)))


PARENT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from test_workers import late
from effnet_fast.training.data.workers import Workers
with Workers(late, 2, forks=True) as workers:
    results = workers.map(iter(int, 1))
    print(*(process.pid for process in workers._processes.values()), flush=True)
    for _ in results:
        pass
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent():
    text = PARENT.format(folder=os.path.dirname(__file__))
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert len(parent.stdout.readline().split()) == 2
        parent.kill()
        # The workers have the pipe, too: it ends when the last of them has ended.
        assert parent.communicate(timeout=LIMIT_S)[0] == b""
