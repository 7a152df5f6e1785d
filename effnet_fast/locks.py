"""Locks that outlive a fork: a child has one thread, and nobody else gives a lock back there."""

from __future__ import annotations

import os
import threading
import weakref
from typing import ClassVar


class ForkLock:
    """A lock for `with`; a forked child finds it free, unless the thread that forks holds it.

    What a lock guards must be whole at any moment that another thread can fork: replaced by one
    assignment, never changed step by step.
    """

    _all: ClassVar[weakref.WeakSet[ForkLock]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that holds it
        self._all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()

    @classmethod
    def _free_in_child(cls) -> None:
        for lock in cls._all:
            if lock._owner != threading.get_ident():
                lock._lock, lock._owner = threading.Lock(), None


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=ForkLock._free_in_child)
