"""Contests of single passes on a GPU: a forward or backward alone, beside cuDNN and native eager.

The peers are stock's whole sequence, by cuDNN, by PyTorch's own depthwise kernels, and compiled;
the convolution alone computes less and is a yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks import op_contests, work
from benchmarks.contest import OURS, Contest
from benchmarks.limits import Work
from cases import DwconvCase, SqueezeExciteCase
from effnet_fast import ops
from parity import Call, random_like

NATIVE, CONV_NATIVE = "torch_native", "conv_alone_native"
BACKWARD_READS_Y = 4  # grad_y and z, by the pass for BN's sums and by the one for the gradients


def dwconv(case: DwconvCase, mode: str, dtype: str, device: str) -> Contest:
    """`op_contests.dwconv` with PyTorch's own kernels beside cuDNN's."""
    return _with_native(op_contests.dwconv(case, mode, dtype, device))


def dwconv_backward(case: DwconvCase, mode: str, dtype: str, device: str) -> Contest:
    """The gradients of x and all parameters, the forward pass left out."""
    contest = op_contests.dwconv(case, mode, dtype, device)
    contest = _backward_of(contest, *op_contests.dwconv_parts(case, mode, dtype))
    x = case.n * case.c * case.h * case.w
    y = case.n * case.c * -(-case.h // case.stride) * -(-case.w // case.stride)
    at_least = Work(
        bytes=work.BYTES[dtype] * (2 * x + BACKWARD_READS_Y * y),
        other_flops=4 * y * case.k**2,
        silus=2 * y,
    )
    return _with_native(replace(contest, what="dwconv_bn_silu_backward", work=at_least))


def squeeze_excite_backward(case: SqueezeExciteCase, mode: str, dtype: str, device: str) -> Contest:
    """The gradients of x and the layers, the forward pass left out."""
    contest = op_contests.squeeze_excite(case, mode, dtype, device)
    contest = _backward_of(contest, *op_contests.squeeze_excite_parts(case, dtype))
    x, weights = case.n * case.c * case.h * case.w, 2 * case.c * case.r
    # x and grad_y for the gate's gradient, grad_y again for that of x, which is written.
    at_least = Work(
        bytes=work.BYTES[dtype] * (4 * x + 2 * weights),
        dense_flops=4 * case.n * weights,
        other_flops=4 * x,
    )
    return replace(contest, what="squeeze_excite_backward", work=at_least)


def _backward_of(contest: Contest, call: Call, stock: nn.Module) -> Contest:
    call = op_contests.on(call, contest.device)
    stock = stock.to(contest.device).train().to(memory_format=torch.channels_last)

    def ours() -> Callable[[], object]:
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        inputs = [tensors[name].requires_grad_() for name in call.differentiable]
        return _gradients(getattr(ops, call.op)(**tensors, **call.options), inputs)

    def theirs() -> Callable[[], object]:
        x = call.x.detach().clone().requires_grad_()
        return _gradients(stock(x), [x, *stock.parameters()])

    build = {OURS: ours, op_contests.STOCK: theirs}
    return replace(contest, build=build, yardsticks=frozenset())


def _gradients(y: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    grad_y = random_like(y.detach())
    return lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True)


def _with_native(contest: Contest) -> Contest:
    build = dict(contest.build)
    names = {op_contests.STOCK: NATIVE, op_contests.CONV: CONV_NATIVE}
    for name, native in names.items():
        if name in build:
            build[native] = _without_cudnn(build[name])
    yardsticks = contest.yardsticks | ({CONV_NATIVE} & build.keys())
    return replace(contest, build=build, yardsticks=frozenset(yardsticks))


def _without_cudnn(build: Callable[[], Callable[[], object]]) -> Callable[[], Callable[[], object]]:
    def native() -> Callable[[], object]:
        with torch.backends.cudnn.flags(enabled=False):
            call = build()

        def run() -> object:
            with torch.backends.cudnn.flags(enabled=False):
                return call()

        return run

    return native
