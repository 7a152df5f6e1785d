"""The passes of an MBConv between its 1x1 convolutions, chained, against autograd.

z1 is the expansion's output, e the gradient of what the projection reads: a2 * gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiers
from activated import SPREAD, slope_of
from effnet_fast.ops.cuda import dwconv_bn_silu as depthwise
from effnet_fast.ops.cuda import squeeze_excite as excitation
from effnet_fast.ops.cuda import statistics
from effnet_fast.ops.cuda.launching import Bn
from effnet_fast.ops.registration import empty_nhwc
from effnet_fast.reference.activations import activate, gate_of
from parity import (
    CUDA_BACKENDS,
    NEEDS_SIMT,
    Results,
    assert_parity,
    channels_last,
    device_of,
)
from tolerances import assert_no_worse_than

EPS = 1e-3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_BACKEND = pytest.mark.parametrize("backend", CUDA_BACKENDS)
ANY_DTYPE = pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, id=str(dtype), marks=tiers.marks("simt", dtype)) for dtype in DTYPES],
)
# n, c, h, w, k, stride, padding (left, right, top, bottom), r
SHAPES = {
    "k3": (3, 24, 9, 8, 3, 1, (1, 1, 1, 1), 5),
    "k5_stride_2_same": (2, 40, 12, 10, 5, 2, (1, 2, 1, 2), 6),
    "k5_c_odd": (2, 37, 17, 21, 5, 1, (2, 2, 2, 2), 9),
    "k3_stride_2": (9, 70, 9, 7, 3, 2, (1, 1, 1, 1), 4),  # more images than a block folds at once
}


class Kinds(NamedTuple):
    """What follows the convolutions and the first layer of the gate, and makes the gate."""

    activation: str = "silu"
    se_activation: str = "silu"
    gate: str = "sigmoid"


SILU, CLAMPS = Kinds(), Kinds("relu6", "relu", "hardsigmoid")
ANY_KIND = pytest.mark.parametrize("kinds", [SILU, CLAMPS], ids=["silu", "clamps"])
ANY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
PARAMETERS = ("gamma1", "beta1", "weight", "gamma2", "beta2", "w1", "b1", "w2", "b2")


def inputs(shape: tuple[Any, ...], dtype: torch.dtype, kinds: Kinds = SILU) -> dict[str, Tensor]:
    """z1, e and the parameters; the convolution's weight in dtype, all other ones fp32.

    Many values meet the bounds of the kinds that have some.
    """
    spread, wide = SPREAD.get(kinds.activation, 1.0), SPREAD.get(kinds.gate, 1.0)
    n, c, h, w, k, stride, (left, right, top, bottom), r = shape
    draws = torch.Generator().manual_seed(3)
    oh, ow = (h + top + bottom - k) // stride + 1, (w + left + right - k) // stride + 1

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draws)

    tensors = {
        "z1": channels_last((normal(n, c, h, w) * 1.5 + 0.5).to(dtype)),
        "e": channels_last(normal(n, c, oh, ow).to(dtype)),
        "weight": (normal(c, 1, k, k).sign() * (0.5 + normal(c, 1, k, k).abs()) / k).to(dtype),
    }
    for i in ("1", "2"):
        tensors["gamma" + i] = (normal(c).abs() + 0.5) * spread
        tensors["beta" + i] = 0.3 * normal(c)
    tensors |= {"w1": normal(r, c) / c**0.5, "b1": 0.3 * normal(r)}
    return tensors | {"w2": wide * normal(c, r) / r**0.5, "b2": wide * 0.3 * normal(c)}


def autograd(
    shape: tuple[Any, ...], tensors: dict[str, Tensor], double: bool, kinds: Kinds = SILU
) -> Results:
    """The same of eager PyTorch: stock's arithmetic in z1's dtype, or float64."""
    stride, padding = shape[5:7]
    leaves = {
        name: (t.double() if double else t.detach().clone()).requires_grad_(name != "e")
        for name, t in tensors.items()
    }
    t = leaves

    def bn_act(z: Tensor, i: str) -> Tensor:
        u = F.batch_norm(z, None, None, t["gamma" + i], t["beta" + i], True, 0.1, EPS)
        return activate(u, kinds.activation)

    a1 = bn_act(t["z1"], "1")
    z2 = F.conv2d(F.pad(a1, padding), t["weight"], None, stride, 0, 1, shape[1])
    a2 = bn_act(z2, "2")
    # As stock's squeeze-and-excitation with fp32 parameters would, under autocast's promotion.
    pooled = a2.mean((2, 3)).to(t["w1"].dtype)
    hidden = F.linear(pooled, t["w1"], t["b1"])
    logit = F.linear(activate(hidden, kinds.se_activation), t["w2"], t["b2"])
    gate = gate_of(logit, kinds.gate)
    out = a2 * gate[:, :, None, None].to(a2.dtype)
    out.backward(t["e"])
    grads = {f"grad {name}": t[name].grad for name in (*PARAMETERS, "z1")}
    results = {"z2": z2, "pooled": pooled, "hidden": hidden, "gate": gate}
    return {k: v.detach() for k, v in results.items()} | grads


def batch_bn(z: Tensor, gamma: Tensor, beta: Tensor) -> Bn:
    """BatchNorm of the batch's own statistics, as the pass before z's gave them."""
    wide = z.double()
    mean, var = wide.mean((0, 2, 3)).float(), wide.var((0, 2, 3), unbiased=False).float()
    return Bn((gamma, beta, mean, var), EPS)


def project_sums(e: Tensor, z2: Tensor, bn: Bn, activation: str) -> Tensor:
    """[3,N,C]: what the projection's data pass yields, sums of e * (a, act'(u), act'(u) * zh)."""
    gamma, beta, mean, var = (v.view(1, -1, 1, 1) for v in bn.vectors)
    zh = (z2.float() - mean) / (var + EPS).sqrt()
    u = zh * gamma + beta
    a, slope = activate(u, activation), slope_of(u, activation)
    return torch.stack([(e.float() * v).sum((2, 3)) for v in (a, slope, slope * zh)])


def chain(
    shape: tuple[Any, ...],
    tensors: dict[str, Tensor],
    backend: str,
    kinds: Kinds = SILU,
    *,
    shift: bool = True,
) -> Results:
    """The passes' results; without `shift` backward lacks dpooled / (H * W)."""
    stride, padding = shape[5:7]
    device = device_of(backend, tensors["z1"])
    t = {name: tensor.to(device) for name, tensor in tensors.items()}
    z1, e = t["z1"], t["e"]
    bn1 = batch_bn(z1, t["gamma1"], t["beta1"])
    z2 = empty_nhwc(z1, e.shape)
    mean, var = depthwise.forward(
        z2, z1, t["weight"], stride, padding, kinds.activation, backend, before=bn1
    )
    bn2 = Bn((t["gamma2"], t["beta2"], mean, var), EPS)
    pooled, *squeezed = excitation.squeeze(z2, bn2, kinds.activation, backend)
    layers = (t["w1"], t["b1"], t["w2"], t["b2"])
    hidden, gate = excitation.excite(pooled, *layers, *kinds[1:], backend)
    s0, *sums = project_sums(e, z2, bn2, kinds.activation)
    dw1, db1, dw2, db2, q, grad_bn = excitation.excite_backward(
        s0, pooled, hidden, gate, t["w1"], t["w2"], 1.0 / (e.shape[2] * e.shape[3]),
        *kinds[1:], backend,
        grad_sums=torch.stack(sums), squeeze_sums=torch.stack(squeezed),
    )  # fmt: skip
    f, dweight, grad_before = depthwise.backward(
        e, z2, z1, t["weight"], bn2, grad_bn, stride, padding, kinds.activation, backend,
        before=bn1, gate=gate, shift=q if shift else None,
    )  # fmt: skip
    gamma, _, mean1, var1 = (v.view(1, -1, 1, 1) for v in bn1.vectors)
    rstd = 1 / (var1 + EPS).sqrt()
    count = z1.numel() / z1.shape[1]
    beta_sum, gamma_sum = (v.view(1, -1, 1, 1) / count for v in grad_before)
    dz1 = gamma * rstd * (f.float() - beta_sum - (z1.float() - mean1) * rstd * gamma_sum)
    grads = {
        "gamma1": grad_before[1], "beta1": grad_before[0], "weight": dweight.to(z1.dtype),
        "gamma2": grad_bn[1], "beta2": grad_bn[0],
        "w1": dw1, "b1": db1, "w2": dw2, "b2": db2, "z1": channels_last(dz1.to(z1.dtype)),
    }  # fmt: skip
    results = {"z2": z2, "pooled": pooled, "hidden": hidden, "gate": gate}
    results |= {f"grad {name}": grad for name, grad in grads.items()}
    return {name: tensor.cpu() for name, tensor in results.items()}


@ANY_BACKEND
@ANY_DTYPE
@ANY_KIND
@ANY_SHAPE
def test_training_chain(
    shape: tuple[Any, ...], kinds: Kinds, dtype: torch.dtype, backend: str
) -> None:
    tensors = inputs(shape, dtype, kinds)
    stock, exact = (autograd(shape, tensors, double, kinds) for double in (False, True))
    assert_parity(chain(shape, tensors, backend, kinds), stock, exact, dtype)


@NEEDS_SIMT
def test_the_chain_notices_a_missing_shift() -> None:
    """Left out, dpooled / (H * W) must show in every gradient before it, and in no other."""
    shape = SHAPES["k3"]
    tensors = inputs(shape, torch.float32)
    wrong = chain(shape, tensors, "simt", shift=False)
    stock, exact = autograd(shape, tensors, False), autograd(shape, tensors, True)
    noticed = set()
    for name in wrong:
        try:
            assert_parity(*({name: r[name]} for r in (wrong, stock, exact)), torch.float32)
        except AssertionError:
            noticed.add(name)
    assert noticed == {"grad weight", "grad gamma1", "grad beta1", "grad z1"}


@ANY_BACKEND
@ANY_DTYPE
@ANY_KIND
@ANY_SHAPE
def test_inference_with_a_norm_before(
    shape: tuple[Any, ...], kinds: Kinds, dtype: torch.dtype, backend: str
) -> None:
    """act(bn2(conv(act(bn1(z1))))) and its mean, in one pass."""
    stride, padding = shape[5:7]
    tensors = inputs(shape, dtype, kinds)
    stats = {i: (0.2 * torch.randn(shape[1]), torch.rand(shape[1]) + 0.5) for i in ("1", "2")}

    def eager(double: bool) -> tuple[Tensor, Tensor]:
        def cast(v: Tensor) -> Tensor:
            return v.double() if double else v

        def bn_act(z: Tensor, i: str) -> Tensor:
            vectors = [cast(v) for v in (*stats[i], tensors["gamma" + i], tensors["beta" + i])]
            return activate(F.batch_norm(z, *vectors, False, 0.1, EPS), kinds.activation)

        a1 = F.pad(bn_act(cast(tensors["z1"]), "1"), padding)
        y = bn_act(F.conv2d(a1, cast(tensors["weight"]), None, stride, 0, 1, shape[1]), "2")
        return y, y.mean((2, 3)).to(torch.float64 if double else torch.float32)

    device = device_of(backend, tensors["z1"])
    t = {name: tensor.to(device) for name, tensor in tensors.items()}
    norms = {
        i: Bn((t["gamma" + i], t["beta" + i], *(s.to(device) for s in stats[i])), EPS)
        for i in ("1", "2")
    }
    y = empty_nhwc(t["z1"], t["e"].shape)
    (pooled,) = depthwise.forward(
        y, t["z1"], t["weight"], stride, padding, kinds.activation, backend,
        before=norms["1"], after=norms["2"],
    )  # fmt: skip
    (stock, stock_pooled), (exact, exact_pooled) = eager(False), eager(True)
    assert_no_worse_than(y.cpu(), stock, exact)
    assert_no_worse_than(pooled.cpu(), stock_pooled, exact_pooled, dtype=dtype)


@ANY_BACKEND
@ANY_DTYPE
@pytest.mark.parametrize("c", [24, 37])
def test_finish(c: int, dtype: torch.dtype, backend: str) -> None:
    """BN, drop-path, residual; and the sums for the gradients of BN's weight and bias."""
    n, h, w = 4, 9, 31
    draws = torch.Generator().manual_seed(5)
    z, x, grad_y = (
        channels_last(torch.randn(n, c, h, w, generator=draws).to(dtype)) for _ in range(3)
    )
    gamma, beta = torch.rand(c, generator=draws) + 0.5, torch.randn(c, generator=draws)
    keep = torch.tensor([0.0, 1.25, 1.25, 0.0])

    def eager(double: bool) -> Results:
        tensors = [v.double() if double else v.clone() for v in (z, x, grad_y, gamma, beta, keep)]
        zs, xs, dy, g, b, k = tensors
        g.requires_grad_(), b.requires_grad_()
        y = F.batch_norm(zs, None, None, g, b, True, 0.1, EPS)
        y = y * k.view(-1, 1, 1, 1).to(y.dtype) + xs
        y.backward(dy)
        return {"y": y.detach(), "grad beta": b.grad, "grad gamma": g.grad}

    device = device_of(backend, z)
    bn = batch_bn(z.to(device), gamma.to(device), beta.to(device))
    y = depthwise.bn_act(
        z.to(device), bn, "identity", backend, keep=keep.to(device), residual=x.to(device)
    )
    images = (z.to(device), grad_y.to(device))
    sums = statistics.channel_sums(backend, statistics.BN, *images, bn, keep.to(device))
    actual = {"y": y.cpu(), "grad beta": sums[0].cpu(), "grad gamma": sums[1].cpu()}
    assert_parity(actual, eager(False), eager(True), dtype)
