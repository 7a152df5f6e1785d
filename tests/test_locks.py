"""Locks in a forked child."""

from __future__ import annotations

import os
import threading
import warnings

import pytest

from effnet_fast.locks import ForkLock


def exit_status_of_child(lock: ForkLock) -> int:
    """Of a child that takes the lock within a second, 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        taken = lock._lock.acquire(timeout=1)
        os._exit(0 if taken else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_child_finds_the_lock_of_another_thread_free() -> None:
    lock = ForkLock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    assert exit_status_of_child(lock) == 0
    assert not lock._lock.acquire(blocking=False)  # here it is held still
    done.set()
    thread.join()
    with lock:
        assert exit_status_of_child(lock) == 1  # the thread that forks goes on holding it
    assert exit_status_of_child(lock) == 0


def test_the_thread_that_forks_within_the_lock_leaves_it() -> None:
    lock = ForkLock()
    with lock:
        child = os.fork()
    if child == 0:
        os._exit(0 if lock._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
