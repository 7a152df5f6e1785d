"""The command line as a process: Ctrl-C, closed pipes, full disks and terminals without Unicode.

It imports nothing beyond the standard library, since it is needed before anything else is there.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 130  # a shell's status for Ctrl-C
BROKEN_PIPE = 141  # a shell's status of what writes to a pipe that nobody reads, as `| head` leaves


def note(message: object) -> None:
    """Prints a line on stderr, where there is one that takes it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"effnet-fast: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def leaving_at_interrupts() -> Iterator[None]:
    """Within the block Ctrl-C ends the process at once.

    Imports need it: some of them turn KeyboardInterrupt into an error of their own.
    """
    found = leave_at_interrupts()
    try:
        yield
    finally:
        if found:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_at_interrupts() -> bool:
    """From now on Ctrl-C ends the process at once; False where others handle or ignore it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _leave)
    return True


def _leave(*_: object) -> NoReturn:
    os._exit(INTERRUPTED)


def prepare_streams() -> None:
    """Makes every print work: on closed streams, and of letters that the terminal lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            # Not from open(), which wants to be closed: the stream lasts as long as the process.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drops what standard output did not take, which the interpreter would try to write again."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
