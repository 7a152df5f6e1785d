"""A block of another package: accelerated, as its package has it, and in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_fast
from effnet_fast.modules import fused_forward
from effnet_fast.modules.explain import explain
from networks import Pair, rms, run_network
from one_block import randomise
from tolerances import assert_parity, dense_strides

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_OTHER = {"contiguous": "channels_last", "channels_last": "contiguous"}
BATCHES = 3  # of images over which errors are judged: those of short tensors are chance in one


class DropoutAs(nn.Module):
    """nn.Dropout for float64 that drops what it would drop of another dtype."""

    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.p, self.dtype = p, dtype

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = F.dropout(torch.ones_like(x, dtype=self.dtype), self.p) != 0
        return x * kept / (1 - self.p)


@contextlib.contextmanager
def fused_runs() -> Iterator[list[bool]]:
    """Of each module that could run fused, whether it did."""
    runs: list[bool] = []
    before: Callable[..., Any] = fused_forward._run_fused

    def record(*arguments: Any) -> Any:
        y = before(*arguments)
        runs.append(y is not None)
        return y

    fused_forward._run_fused = record
    try:
        yield runs
    finally:
        fused_forward._run_fused = before


@dataclass(frozen=True)
class Blocks(Pair):
    """A block accelerated, and as its package has it."""

    @property
    def refusal(self) -> str | None:
        """Why it runs as stock."""
        return explain(self.actual)

    def assert_fused_parity(
        self,
        sizes: Sequence[int],
        layout: str,
        dtype: torch.dtype = torch.float32,
        widen: Callable[[Any], object] = lambda exact: None,
    ) -> None:
        """Holds outputs, gradients and buffers to the rule of parity, and the layout to stock's.

        A running statistic's error depends on the order in which stock happens to add: the larger
        of those in its two layouts counts.

        Args:
            sizes: channels, height and width of the images.
            layout: of the images, a key of LAYOUTS.
            dtype: of the images; bf16 under autocast.
            widen: makes the copy in float64 draw what the stock block draws.
        """
        exact, other = copy.deepcopy(self.stock).double(), copy.deepcopy(self.stock)
        widen(exact)
        generator = torch.Generator().manual_seed(1)
        rows: list[list[dict[str, Tensor]]] = [[], [], [], []]
        for _ in range(BATCHES):
            images = torch.randn(4, *sizes, generator=generator).to(dtype)
            x, as_other = (images.to(memory_format=LAYOUTS[n]) for n in (layout, _OTHER[layout]))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                with fused_runs() as runs:
                    rows[0].append(run_network(self.actual, x))
                rows[1].append(run_network(self.stock, x))
                rows[3].append(run_network(other, as_other))
            assert runs == [True]
            rows[2].append(run_network(exact, x.double()))
            ours, theirs = rows[0][-1], rows[1][-1]
            for name in ("y", "grad x"):
                assert dense_strides(ours[name]) == dense_strides(theirs[name]), name
        stacked = [{name: torch.stack([r[name] for r in row]) for name in row[0]} for row in rows]
        ours, theirs, truth, turned = stacked
        for name in (
            n for n, t in theirs.items() if n.startswith("buffer") and t.is_floating_point()
        ):
            if rms(turned[name] - truth[name]) > rms(theirs[name] - truth[name]):
                theirs[name] = turned[name]
        assert_parity(ours, theirs, truth, dtype)

    def edited(self, edit: Callable[[Any], object]) -> Blocks:
        """The pair after the same edit of both, which were fused before it."""
        assert self.refusal is None
        self.apply(edit)
        return self


def blocks(make: Callable[[], nn.Module], training: bool = False) -> Blocks:
    """A block with weights that keep the variance at about 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = randomise(make()).train(training)
    return Blocks(effnet_fast.accelerate(copy.deepcopy(stock)), stock)
