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
from cases import DwconvCase, SqueezeExciteCase
from effnet_fast import ops
from parity import Call, random_like

NATIVE, CONV_NATIVE = "torch_native", "conv_alone_native"


def dwconv(case: DwconvCase, mode: str, dtype: str, device: str) -> Contest:
    """`op_contests.dwconv` with PyTorch's own kernels beside cuDNN's."""
    return _with_native(op_contests.dwconv(case, mode, dtype, device))


def dwconv_backward(case: DwconvCase, mode: str, dtype: str, device: str) -> Contest:
    """The gradients of x and all parameters, the forward pass left out."""
    contest = op_contests.dwconv(case, mode, dtype, device)
    contest = _backward_of(contest, case.name, *op_contests.dwconv_parts(case, mode, dtype))
    at_least = work.dwconv_backward(case, dtype)
    return _with_native(replace(contest, what="dwconv_bn_silu_backward", work=at_least))


def squeeze_excite(case: SqueezeExciteCase, mode: str, dtype: str, device: str) -> Contest:
    """`op_contests.squeeze_excite` with PyTorch's own kernels beside cuDNN's."""
    return _with_native(op_contests.squeeze_excite(case, mode, dtype, device))


def squeeze_excite_backward(case: SqueezeExciteCase, mode: str, dtype: str, device: str) -> Contest:
    """The gradients of x and the layers, the forward pass left out."""
    contest = op_contests.squeeze_excite(case, mode, dtype, device)
    contest = _backward_of(contest, case.name, *op_contests.squeeze_excite_parts(case, dtype))
    at_least = work.squeeze_excite_backward(case, dtype)
    return _with_native(replace(contest, what="squeeze_excite_backward", work=at_least))


def _backward_of(contest: Contest, name: str, call: Call, stock: nn.Module) -> Contest:
    call = op_contests.on(call, contest.device)
    stock = stock.to(contest.device).train().to(memory_format=torch.channels_last)

    def ours() -> Callable[[], object]:
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        inputs = [tensors[name].requires_grad_() for name in call.differentiable]
        return _gradients(getattr(ops, call.op)(**tensors, **call.options), inputs)

    def theirs(forward: Callable[[Tensor], Tensor] = stock) -> Callable[[], object]:
        x = call.x.detach().clone().requires_grad_()
        return _gradients(forward(x), [x, *stock.parameters()])

    def compiled() -> Callable[[], object]:
        def build() -> Callable[[], object]:
            # The compiler would else reuse what was saved, which a second backward needs.
            with torch._functorch.config.patch(donated_buffer=False):
                run = theirs(torch.compile(stock))
                run()
            return run

        return op_contests.compiled(name, build)

    build = {OURS: ours, op_contests.STOCK: theirs, op_contests.COMPILED: compiled}
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
