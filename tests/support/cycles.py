"""What a function leaves to the garbage collector, since its references form a circle."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor


def left_in_cycles(function: Callable[[], object]) -> list[object]:
    """Tensors and objects of this package that stay until the collector runs.

    What else is collected at that moment may be another test's.
    """
    for _ in range(2):  # what is imported or cached is so by then
        function()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        function()
        gc.collect()
        return [
            found
            for found in gc.garbage
            if isinstance(found, Tensor) or type(found).__module__.startswith("effnet_fast")
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
