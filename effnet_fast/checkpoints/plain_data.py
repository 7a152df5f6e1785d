"""The options and metrics that training scripts store beside the weights, as plain data.

A file names the functions that its pickle calls. The names below lead to functions of this file
and to classes that only keep what they are given, so that no file reaches a function that builds
an object from its description: numpy's own `scalar(dtype("O,O"))` reads through a null pointer.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from effnet_fast.locks import ForkLock

# numpy's numbers by the letters and sizes under which it pickles their types.
NUMBERS = {np.dtype(code).str[1:]: np.dtype(code) for code in "?bBhHiIlLqQefdgFDG"}


class NumberType:
    """Stands for numpy's dtype in a file: its code and whether it is big-endian."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in NUMBERS:
            # In torch's words for what it refuses, from which the reader takes the name.
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) is no number's")
        self.dtype = NUMBERS[code]

    def __setstate__(self, state: Any) -> None:
        """Takes the byte order of numpy's tuple, and leaves the rest, which numbers do not use."""
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def number(kind: Any, data: Any = None) -> Any:
    """Python's number for numpy's scalar."""
    if not (isinstance(kind, NumberType) and isinstance(data, bytes)):
        raise pickle.UnpicklingError("a numpy scalar that is no number")
    if len(data) != kind.dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(data)} bytes for a number of {kind.dtype.itemsize}")
    return np.frombuffer(data, kind.dtype)[0].item()


# A path of any system is read as a name, which touches no disk.
PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    (NumberType, "numpy.dtype"),
    *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(
        (pathlib.PurePosixPath, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
]
NAMES = {entry[1] for entry in PLAIN_DATA if isinstance(entry, tuple)}


class _Allowance:
    """PLAIN_DATA among the names that torch.load takes, as long as any thread reads a file.

    torch has one list for the process. The caller's own entries for these names do not count
    meanwhile, and come back; what others add meanwhile stays.
    """

    def __init__(self) -> None:
        self._lock = ForkLock()
        self._readers = 0
        self._added: set[Any] = set()
        self._set_aside: set[Any] = set()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._readers == 0:
                callers = set(get_safe_globals())
                self._added = set(PLAIN_DATA) - callers
                self._set_aside = {e for e in callers - set(PLAIN_DATA) if _name(e) in NAMES}
                _replace(self._set_aside, self._added)
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if self._readers == 0:
                    _replace(self._added, self._set_aside)


def _replace(old: set[Any], new: set[Any]) -> None:
    """Takes entries out of torch's list and puts others in."""
    kept = set(get_safe_globals()) - old
    clear_safe_globals()
    add_safe_globals([*kept, *new])


def _name(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


allowed = _Allowance()
