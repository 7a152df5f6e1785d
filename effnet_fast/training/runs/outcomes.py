"""The losses of steps, read without making a GPU wait."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """What a step gave, over all processes."""

    loss: float  # sum over the images
    images: float
    stop: float  # above 0: a signal asks for the end
    save: float  # above 0: the state is due
    unreadable: float  # training images that nobody knew to be unreadable
    local: float  # this process's loss
    step: int  # number of steps before this one
    rate: float
    batches: Any  # of the step, for a report of a loss that is no number


SUMMED = 5  # fields at the beginning that are added up over the processes
OF_DEVICE = 6  # fields at the beginning that come from the device


class OutcomeReader:
    """Hands out outcomes once they are computed: at once on a CPU, a step later on CUDA.

    A GPU always has the next step queued before the last one's loss is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self._waiting: list[tuple[Tensor, Any, tuple[int, float, Any]]] = []

    def put(self, values: Tensor, step: int, rate: float, batches: Any) -> list[Outcome]:
        """Takes a step's values; the outcomes that are ready.

        Args:
            values: the first fields of an outcome, float64 [OF_DEVICE].
        """
        event = None
        if self.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((values, event, (step, rate, batches)))
        return self._take(1 if self.is_cuda else 0)

    def flush(self) -> list[Outcome]:
        """Waits for the rest."""
        return self._take(0)

    def _take(self, keep: int) -> list[Outcome]:
        taken = []
        while len(self._waiting) > keep:
            values, event, rest = self._waiting.pop(0)
            if event is not None:
                event.synchronize()
            taken.append(Outcome._make((*values.tolist(), *rest)))
        return taken
