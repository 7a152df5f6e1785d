"""What a function leaves to the garbage collector, since its references form a circle."""

from __future__ import annotations

import gc
from collections.abc import Callable

MOST_ROUNDS = 5


def left_in_cycles(function: Callable[[], object]) -> list[object]:
    """Objects and functions of this package that stay until the collector runs.

    What else is collected at that moment may be another test's.
    """
    for _ in range(2):  # what is imported or cached is so by then
        function()
    for _ in range(MOST_ROUNDS):  # finalizers leave more to collect
        if gc.collect() == 0:
            break
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        function()
        gc.collect()
        return [
            found
            for found in gc.garbage
            if str(getattr(found, "__module__", "")).startswith("effnet_fast")
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
