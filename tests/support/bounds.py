"""Parity of what has bounds, where a value that is rounded across one takes another slope.

Two right results then differ by a whole gradient. In fp32, and in fp16 where images are small, that
is rare: draws are taken that keep a distance. In bf16 it happens among an image's values in stock
as often as in the tested kernel: the rule of parity is held over several draws at once, as it is
for tensors of few numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tolerances
from effnet_fast.reference import activations
from parity import Results, assert_parity

BOUNDS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "hardsigmoid": (-3.0, 3.0)}
# Some 30 roundings of fp32; two of fp16, of numbers of about 1.
MARGINS = {torch.float32: 3e-5, torch.float16: 1e-3}
VECTOR_MARGIN = 0.02  # of squeeze-and-excite's few numbers in bf16, which are means of many
DRAWS = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 1}
NUMBERS = 20_000  # of images in bf16: enough to meet the bounds often


def margin(run: Callable[[], object], of_vectors: bool = False) -> float:
    """The least distance to a bound of what reaches an activation or a gate of the reference.

    Args:
        of_vectors: counting squeeze-and-excite's [N,C,1,1] alone.
    """
    least = [float("inf")]

    def measured(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        counts = x.numel() and (x.shape[2:] == (1, 1) or not of_vectors)
        for bound in BOUNDS.get(name, ()) if counts else ():
            least.append(float((x.detach() - bound).abs().min()))
        return function(x)

    rows = {
        name: row._replace(activate=functools.partial(measured, name, row.activate))
        for name, row in activations._ACTIVATIONS.items()
    }
    gates = {
        name: (kind, functools.partial(measured, name, function))
        for name, (kind, function) in activations._GATES.items()
    }
    with (
        mock.patch.dict(activations._ACTIVATIONS, rows),
        mock.patch.dict(activations._GATES, gates),
    ):
        run()
    return min(least)


def draws(make: Callable[[int], Any], exactly: Callable[[Any], object]) -> Sequence[Any]:
    """Calls from several seeds, for `assert_over`, which keep a distance from the bounds.

    Args:
        make: a call, which has an x, from its seed.
        exactly: runs it on the reference in float64.
    """
    x: Tensor = make(0).x
    calls: Iterator[Any] = map(make, itertools.count())
    count, keeps = DRAWS[x.dtype], x.dtype in MARGINS
    least = MARGINS.get(x.dtype, VECTOR_MARGIN)
    if not keeps:
        count = max(count, -(-NUMBERS // x.numel()))
    clear = (c for c in calls if margin(functools.partial(exactly, c), not keeps) > least)
    return list(itertools.islice(clear, count))


def assert_over(
    calls: Sequence[Any], run: Callable[[Any], Results], reference: Callable[..., Results]
) -> None:
    """Holds the calls to the rule of parity, all of their results stacked, and strides to stock's.

    Args:
        run: what is tested.
        reference: takes double=True for float64.
    """
    rows: tuple[list[Results], ...] = ([], [], [])
    for call in calls:
        results = run(call), reference(call), reference(call, double=True)
        for row, each in zip(rows, results, strict=True):
            row.append(each)
        for name, tensor in results[0].items():
            assert tolerances.dense_strides(tensor) == tolerances.dense_strides(results[1][name])
    stacked = ({name: torch.stack([r[name] for r in row]) for name in row[0]} for row in rows)
    assert_parity(*stacked, calls[0].x.dtype)
