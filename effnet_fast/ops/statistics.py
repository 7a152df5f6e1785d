"""BatchNorm's running statistics in training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.call import Norm
from effnet_fast.ops.gate import gate
from effnet_fast.ops.norms import MEAN, VAR
from effnet_fast.ops.registration import LIBRARY, RULES
from effnet_fast.reference.arguments import Layer

_NAME = "move_statistics"
RULES[_NAME] = {
    **dict.fromkeys(("running_mean", "running_var", "mean", "var"), "fp32 C"),
    "correction": "any",
    "momentum": "any",
}


@functools.cache
def _gate() -> Callable[..., None]:
    return gate(_NAME, RULES[_NAME], ("cpu",), ())


def _move(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    correction: float,
    momentum: float,
) -> None:
    _gate()(running_mean, running_var, mean, var, correction, momentum)
    _bump((running_mean, running_var))
    native.load().move_statistics(
        mean.numel(), mean.data_ptr(), var.data_ptr(),
        running_mean.data_ptr(), running_var.data_ptr(), correction, momentum,
    )  # fmt: skip


def _bump(written: Iterable[Tensor]) -> None:
    """Tells autograd of tensors that were written through their addresses."""
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


# No backend: the CPU alone has it.
LIBRARY.define(
    f"{_NAME}(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
    "float correction, float momentum) -> ()"
)
LIBRARY.impl(_NAME, _move, "CPU")
torch.library.register_fake(f"effnet_fast::{_NAME}", lambda *_: None, lib=LIBRARY)
move_op = torch.ops.effnet_fast.move_statistics.default


class Moves:
    """Moves the running statistics [C] of BatchNorms that normalise by the batch, once.

    An autograd Function moves them in its forward, before it saves anything: PyTorch's checkpoints
    end their second run where the last tensor is saved, and stock's BatchNorms have moved by then.

    Args:
        batches: of each, how it normalises, its layer or None where there is none, and the shape
            [N,C,H,W] of what it normalises. Nothing moves where a shape is empty.

    Attributes:
        inside: whether the forward of a Function moves them; torch.compile traces one, which may
            not write.

    Raises:
        ValueError: one of them would normalise one value per channel.
    """

    def __init__(self, *batches: tuple[Norm, Layer | None, tuple[int, ...]]) -> None:
        self._batches: list[tuple[Norm, Layer, int] | None] = []
        for norm, layer, shape in batches:
            if layer is None or not norm.training:
                self._batches.append(None)
                continue
            count = shape[0] * shape[2] * shape[3]
            if count == 1 and norm.exchange is None:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{torch.Size(shape)}"
                )
            self._batches.append((norm, layer, count))
        self.inside = not torch.compiler.is_compiling()

    def in_one_call(self) -> tuple[tuple[tuple[float, float] | None, ...], list[Tensor]]:
        """For a kernel that moves them, of BatchNorms of no other process.

        Returns:
            of each the factor from the biased variance to the unbiased one and the momentum, None
            where nothing moves; and the statistics that move, for `end`.
        """
        moves: list[tuple[float, float] | None] = []
        moved: list[Tensor] = []
        for batch in self._batches:
            moves.append(None)
            if batch is None:
                continue
            norm, layer, count = batch
            if norm.moves and layer[3] is not None:
                moves[-1] = _correction(count), norm.momentum
                moved += layer[3:5]
        return tuple(moves), moved

    def end(self, moved: list[Tensor]) -> None:
        """Notes that a kernel has moved them, and written to these statistics."""
        self._batches = []
        _bump(moved)

    def __call__(self, *norms: Tensor | tuple[Tensor, Tensor] | None) -> None:
        """Moves them, unless they have been moved.

        Args:
            norms: of each BatchNorm its norm [5,C], see `norms`, or the mean and the biased
                variance [C] alone, in fp32.
        """
        batches, self._batches = self._batches, []  # none are left for the second time
        for batch, moments in zip(batches, norms, strict=False):
            if batch is None or moments is None:
                continue
            norm, layer, count = batch
            is_empty = norm.exchange.is_empty if norm.exchange else count == 0
            if norm.moves and layer[3] is not None and not is_empty:
                pair = (moments[MEAN], moments[VAR]) if isinstance(moments, Tensor) else moments
                factor = norm.exchange.correction if norm.exchange else _correction(count)
                update(layer[3], layer[4], *pair, factor, norm.momentum)


def _correction(count: int) -> float:
    """The factor from the biased variance of so many values to the unbiased one."""
    return count / (count - 1) if count > 1 else 1.0


def update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    correction: float | Tensor,
    momentum: float,
) -> None:
    """Moves running statistics [C] in place by a batch's mean and biased variance [C].

    correction makes the variance unbiased; momentum is the batch's share.
    """
    with torch.no_grad():
        if (
            isinstance(correction, float)
            and mean.device.type == "cpu"
            and mean.dtype is torch.float32
            and all(
                v.dtype is torch.float32
                and v.is_contiguous()
                and v.device == mean.device
                and not _is_negative(v)
                for v in (running_mean, running_var)
            )
        ):
            move_op(running_mean, running_var, mean, var, correction, momentum)
            return
        for running, batch in ((running_mean, mean), (running_var, var * correction)):
            if _is_negative(running):  # PyTorch's batch_norm moves a copy of it
                continue
            # Not lerp, which makes NaN of an infinite statistic.
            wide = torch.promote_types(running.dtype, torch.float32)
            moved = running.to(wide).mul_(1.0 - momentum).add_(batch, alpha=momentum)
            if moved is not running:
                running.copy_(moved)


def _is_negative(tensor: Tensor) -> bool:
    """Whether torch keeps its sign in a bit; torch.compile cannot ask."""
    return not torch.compiler.is_compiling() and tensor.is_neg()
