"""Contests of an MBConv's passes that no op is alone: squeeze, finish, BN's sums in backward.

The peer is what stock runs there, op by op; in the squeeze it computes the mean alone, without the
two sums that backward will need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import work
from benchmarks.contest import OURS, Contest
from benchmarks.limits import DTYPES, Work
from benchmarks.op_contests import STOCK
from cases import SqueezeExciteCase
from effnet_fast.ops.cuda import dwconv_bn_silu as depthwise
from effnet_fast.ops.cuda import squeeze_excite as excitation
from effnet_fast.ops.cuda import statistics
from effnet_fast.ops.cuda.launching import Bn
from parity import channels_last
from tolerances import assert_no_worse_than

EPS = 1e-3
Pass = Callable[[], tuple[Tensor, ...]]


class _Inputs:
    """z, grad_y and x [N,C,H,W], BatchNorm's vectors [C], drop-path's factors [N]."""

    def __init__(self, case: SqueezeExciteCase, dtype: str, device: str) -> None:
        draws = torch.Generator().manual_seed(0)
        sizes = (case.n, case.c, case.h, case.w)
        images = [torch.randn(sizes, generator=draws).to(DTYPES[dtype]) for _ in range(3)]
        vectors = [torch.rand(case.c, generator=draws) + 0.5 for _ in range(4)]
        self.z, self.grad_y, self.x = (channels_last(image).to(device) for image in images)
        self.gamma, self.beta, self.mean, self.var = (v.to(device) for v in vectors)
        self.keep = (torch.rand(case.n, generator=draws) + 0.5).to(device)

    def double(self) -> _Inputs:
        """The same in float64."""
        alike = object.__new__(_Inputs)
        alike.__dict__ = {name: tensor.double() for name, tensor in self.__dict__.items()}
        return alike

    def bn(self) -> Bn:
        return Bn((self.gamma, self.beta, self.mean, self.var), EPS)

    def normed(self) -> Tensor:
        return F.batch_norm(self.z, self.mean, self.var, self.gamma, self.beta, False, 0.0, EPS)


def squeeze(case: SqueezeExciteCase, dtype: str, device: str) -> Contest:
    """The mean of silu(bn(z)) in fp32; this package's pass yields two more sums."""
    t = _Inputs(case, dtype, device)

    def stock(t: _Inputs) -> tuple[Tensor, ...]:
        return (F.silu(t.normed()).mean((2, 3)).to(t.gamma.dtype),)

    def ours(backend: str) -> tuple[Tensor, ...]:
        return (excitation.squeeze(t.z, t.bn(), "silu", backend)[0],)

    return _contest("mbconv_squeeze", case, dtype, device, t, ours, stock, passes=1, silus=1)


def finish(case: SqueezeExciteCase, dtype: str, device: str) -> Contest:
    """bn(z) * keep + x."""
    t = _Inputs(case, dtype, device)

    def stock(t: _Inputs) -> tuple[Tensor, ...]:
        return (t.normed() * t.keep.to(t.z.dtype).view(-1, 1, 1, 1) + t.x,)

    def ours(backend: str) -> tuple[Tensor, ...]:
        more = {"keep": t.keep, "residual": t.x}
        return (depthwise.bn_act(t.z, t.bn(), "identity", backend, **more),)

    return _contest("mbconv_finish", case, dtype, device, t, ours, stock, passes=3)


def bn_sums(case: SqueezeExciteCase, dtype: str, device: str) -> Contest:
    """Over each channel the sums of du = grad_y * silu'(bn(z)) and of du * zh."""
    t = _Inputs(case, dtype, device)

    def stock(t: _Inputs) -> tuple[Tensor, ...]:
        du = torch.ops.aten.silu_backward(t.grad_y, t.normed())
        zh = F.batch_norm(t.z, t.mean, t.var, None, None, False, 0.0, EPS)
        return tuple(v.sum((0, 2, 3)).to(t.gamma.dtype) for v in (du, du * zh))

    def ours(backend: str) -> tuple[Tensor, ...]:
        sums = statistics.channel_sums(
            backend, statistics.BN_ACT, t.z, t.grad_y, t.bn(), activation="silu"
        )
        return tuple(sums.unbind())

    return _contest("bn_sums", case, dtype, device, t, ours, stock, passes=2, silus=1)


def _contest(
    what: str,
    case: SqueezeExciteCase,
    dtype: str,
    device: str,
    t: _Inputs,
    ours: Callable[[str], tuple[Tensor, ...]],
    stock: Callable[[_Inputs], tuple[Tensor, ...]],
    *,
    passes: int,
    silus: int = 0,
) -> Contest:
    """passes: tensors of the size of z that are read and written; silus: for each element of z."""
    backend = "simt" if device == "cpu" else "cuda"

    def check() -> None:
        for actual, rounded, exact in zip(ours(backend), stock(t), stock(t.double()), strict=True):
            assert_no_worse_than(actual, rounded, exact, dtype=DTYPES[dtype])

    elements = t.z.numel()
    return Contest(
        *(what, case.name, "training", dtype, device, case.n),
        build={
            OURS: lambda: torch.no_grad()(lambda: ours(backend)),
            STOCK: lambda: torch.no_grad()(lambda: stock(t)),
        },
        check=check,
        work=Work(bytes=work.BYTES[dtype] * passes * elements, silus=silus * elements),
    )
