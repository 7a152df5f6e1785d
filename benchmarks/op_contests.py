"""Contests of single ops: this package's against torchvision's modules, on the same values.

The peer is stock's whole sequence, run by PyTorch as it is, and compiled; beside it stands the
convolution alone, which computes less and is no peer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import efficientnet as torchvision_efficientnet

from benchmarks import work
from benchmarks.contest import OURS, Contest, UnavailableError
from benchmarks.limits import DTYPES
from cases import DwconvCase, MBConvCase, PointwiseCase, SqueezeExciteCase, StemCase
from effnet_fast import ops
from effnet_fast.backends import use_backend
from effnet_fast.modules import layers
from parity import (
    Call,
    Dtypes,
    check,
    dwconv_call,
    head_call,
    pointwise_call,
    random_like,
    squeeze_excite_call,
    stem_call,
)
from tolerances import GRADIENT_FACTOR, assert_no_worse_than

STOCK, COMPILED, CONV = "torch", "torch_compile", "conv_alone"
Case = DwconvCase | SqueezeExciteCase | PointwiseCase | MBConvCase | StemCase


def dwconv(case: DwconvCase, mode: str, dtype: str, device: str) -> Contest:
    """Depthwise convolution, BN, SiLU."""
    call, stock = dwconv_parts(case, mode, dtype)
    contest = _contest("dwconv_bn_silu", case, mode, dtype, device, call, stock)
    return _with_conv(replace(contest, work=work.dwconv(case, mode, dtype)), call, stock)


def dwconv_parts(case: DwconvCase, mode: str, dtype: str) -> tuple[Call, nn.Module]:
    """The call of the op, and torchvision's module with the same values; on the CPU."""
    call = dwconv_call(case, _dtypes(dtype), training=mode == "training")
    return call, _conv_norm(call, case.c, case.c, case.k, case.stride, groups=case.c)


def squeeze_excite(case: SqueezeExciteCase, mode: str, dtype: str, device: str) -> Contest:
    """Mean, two small layers, and the product with their gate."""
    call, stock = squeeze_excite_parts(case, dtype)
    contest = _contest("squeeze_excite", case, mode, dtype, device, call, stock)
    return replace(contest, work=work.squeeze_excite(case, mode, dtype))


def squeeze_excite_parts(case: SqueezeExciteCase, dtype: str) -> tuple[Call, nn.Module]:
    """The call of the op, and torchvision's module with the same values; on the CPU."""
    call = squeeze_excite_call(case, _dtypes(dtype))
    stock = torchvision.ops.SqueezeExcitation(case.c, case.r, activation=nn.SiLU)
    names = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    layer = (stock.fc1.weight, stock.fc1.bias, stock.fc2.weight, stock.fc2.bias)
    for parameter, name in zip(layer, names, strict=True):
        parameter.data = call.tensors[name].clone().reshape(parameter.shape)
    return call, stock


class _GatedConv(nn.Module):
    """conv_norm(x * gate) + residual, of torchvision's parts."""

    def __init__(self, conv_norm: nn.Module, call: Call) -> None:
        super().__init__()
        self.conv_norm = conv_norm
        self.gate, self.residual = call.tensors["gate"], call.tensors["residual"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_norm(x if self.gate is None else self.gate * x)
        if self.residual is not None:
            y += self.residual
        return y

    def __getitem__(self, index: int) -> nn.Module:
        return self.conv_norm[index]


def pointwise(case: PointwiseCase, mode: str, dtype: str, device: str) -> Contest:
    """1x1 convolution with a gate on its operand, BN, SiLU or none, residual; inference."""
    call = pointwise_call(case, _dtypes(dtype))
    call = on(call, device)
    stock = _GatedConv(_conv_norm(call, case.c, case.out, 1, 1, act=case.act), call)
    contest = _contest("pointwise_bn_act", case, mode, dtype, device, call, stock)
    return _with_conv(replace(contest, work=work.pointwise(case, mode, dtype)), call, stock)


def head(case: PointwiseCase, mode: str, dtype: str, device: str) -> Contest:
    """1x1 convolution, BN, SiLU, and the mean over all pixels."""
    call = head_call(case, _dtypes(dtype), training=mode == "training")
    layer = _conv_norm(call, case.c, case.out, 1, 1)
    stock = nn.Sequential(*layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    contest = _contest("pointwise_bn_silu_pool", case, mode, dtype, device, call, stock)
    return _with_conv(replace(contest, work=work.head(case, mode, dtype)), call, stock)


def stem(case: StemCase, mode: str, dtype: str, device: str) -> Contest:
    """Dense convolution of an image, BN, SiLU; the image asks for no gradient."""
    call, stock = stem_parts(case, mode, dtype)
    contest = _contest("stem_conv_bn_silu", case, mode, dtype, device, call, stock, data=False)
    return _with_conv(replace(contest, work=work.stem(case, mode, dtype)), call, stock)


def stem_parts(case: StemCase, mode: str, dtype: str) -> tuple[Call, nn.Module]:
    """The call of the op, and torchvision's module with the same values; on the CPU."""
    call = stem_call(case, _dtypes(dtype), training=mode == "training")
    return call, _conv_norm(call, case.c, case.out, case.k, case.stride)


def mbconv(case: MBConvCase, mode: str, dtype: str, device: str) -> Contest:
    """A whole block, this package's module against torchvision's."""
    generator = torch.Generator().manual_seed(0)
    config = torchvision_efficientnet.MBConvConfig(
        case.expanded / case.c, case.k, case.stride, case.c, case.out, 1
    )
    stock = torchvision_efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)
    fused = layers.MBConv(
        layers.MBConvConfig(case.expanded / case.c, case.k, case.stride, case.c, case.out),
        *(0.0, nn.BatchNorm2d),
    )
    with torch.no_grad():
        for tensor in stock.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    fused.load_state_dict(stock.state_dict())
    modules = [m.to(DTYPES[dtype]).train(mode == "training").to(device) for m in (stock, fused)]
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator).to(DTYPES[dtype])
    x = x.to(device, memory_format=torch.channels_last)
    stock, fused = (m.to(memory_format=torch.channels_last) for m in modules)
    return Contest(
        *("mbconv", case.name, mode, dtype, device, case.n),
        build={
            OURS: lambda: _caller(fused, x, mode, "auto"),
            STOCK: lambda: _caller(stock, x, mode, "auto"),
            COMPILED: lambda: _compiled(case, stock, x, mode),
        },
        check=lambda: _check_modules(fused, stock, x, mode),
        work=work.mbconv(case, mode, dtype),
    )


def _dtypes(dtype: str) -> Dtypes:
    return Dtypes(DTYPES[dtype], DTYPES[dtype])


def on(call: Call, device: str) -> Call:
    tensors = {k: None if t is None else t.to(device) for k, t in call.tensors.items()}
    return call.with_tensors(**tensors)


def _conv_norm(
    call: Call,
    c: int,
    out: int,
    kernel: int,
    stride: int,
    *,
    groups: int = 1,
    act: str | None = "silu",
) -> nn.Module:
    module = torchvision.ops.Conv2dNormActivation(
        *(c, out, kernel, stride), groups=groups, activation_layer=nn.SiLU if act else None
    )
    conv, bn = module[0], module[1]
    conv.weight.data = call.tensors["weight"].clone()
    for name in ("running_mean", "running_var"):
        setattr(bn, name, call.tensors[name].clone())
    bn.weight.data, bn.bias.data = (call.tensors[n].clone() for n in ("bn_weight", "bn_bias"))
    return module


def _contest(
    what: str,
    case: Case,
    mode: str,
    dtype: str,
    device: str,
    call: Call,
    stock: nn.Module,
    *,
    data: bool = True,
) -> Contest:
    """data: whether training asks for the gradient of x."""
    call = on(call, device)
    stock = stock.to(device).train(mode == "training").to(memory_format=torch.channels_last)
    differentiable = [name for name in call.differentiable if data or name != "x"]
    wanted = differentiable if mode == "training" else ()
    x = call.x

    def ours() -> Callable[[], object]:
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        inputs = [tensors[name].requires_grad_(bool(wanted)) for name in differentiable]
        function = getattr(ops, call.op)
        return _step(lambda: function(**tensors, **call.options), inputs, mode)

    return Contest(
        *(what, case.name, mode, dtype, device, case.n),
        build={
            OURS: ours,
            STOCK: lambda: _caller(stock, x, mode, "auto", data),
            COMPILED: lambda: _compiled(case, stock, x, mode, data),
        },
        check=lambda: check(call, "auto", wanted=wanted) and None,
    )


def _with_conv(contest: Contest, call: Call, stock: nn.Module) -> Contest:
    """The contest with the convolution alone beside it, in inference."""
    if contest.mode != "inference":
        return contest
    conv, x = stock[0], call.x.to(contest.device)
    build = {**contest.build, CONV: lambda: _caller(conv, x, "inference", "auto")}
    return replace(contest, build=build, yardsticks=frozenset((CONV,)))


def compiled(name: str, build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """What `build` makes, which has compiled; for B0's shapes.

    Raises:
        UnavailableError: the shape is another network's, or the compiler failed.
    """
    if not name.startswith("b0"):
        raise UnavailableError("torch.compile takes seconds for every shape: B0's only")
    try:
        return build()
    except Exception as error:  # a compiler may raise anything: no contestant then
        raise UnavailableError(f"torch.compile: {type(error).__name__}") from error


def _compiled(
    case: Case, module: nn.Module, x: Tensor, mode: str, data: bool = True
) -> Callable[[], object]:
    def build() -> Callable[[], object]:
        call = _caller(torch.compile(module), x, mode, "auto", data)
        call()
        return call

    return compiled(case.name, build)


def _caller(
    module: nn.Module, x: Tensor, mode: str, backend: str, data: bool = True
) -> Callable[[], object]:
    image = x.detach().clone().requires_grad_(data and mode == "training")
    inputs = [image] * data + (list(module.parameters()) if mode == "training" else [])
    return _step(lambda: module(image), inputs, mode, backend)


def _step(
    forward: Callable[[], Tensor], inputs: list[Tensor], mode: str, backend: str = "auto"
) -> Callable[[], object]:
    """One call, in training with the gradients of all inputs."""
    if mode == "inference":

        def infer() -> Tensor:
            with torch.inference_mode(), use_backend(backend):
                return forward()

        return infer
    with use_backend(backend):
        grad_y = random_like(forward())

    def train() -> object:
        with use_backend(backend):
            return torch.autograd.grad(forward(), inputs, grad_y)

    return train


def _check_modules(fused: nn.Module, stock: nn.Module, x: Tensor, mode: str) -> None:
    """The rule of parity on a block's output and gradients; leaves all as it was."""

    def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        module = copy.deepcopy(module)
        if mode == "inference":
            with torch.inference_mode():
                return {"y": module(x)}
        x = x.detach().clone().requires_grad_()
        y = module(x)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator).to(y))
        grads = {f"grad {name}": p.grad for name, p in module.named_parameters()}
        return {"y": y.detach(), "grad x": x.grad, **grads}

    actual, expected = results(fused, x), results(stock, x)
    exact = results(copy.deepcopy(stock).double(), x.double())
    for name, tensor in actual.items():
        factor = GRADIENT_FACTOR if name.startswith("grad ") else 2.0
        try:
            assert_no_worse_than(tensor, expected[name], exact[name], factor, dtype=x.dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
