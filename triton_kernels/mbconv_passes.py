"""The passes of a staged MBConv: the registered ops `mbconv_*` on the kernels of the other files.

Computes: what `effnet_fast.ops.mbconv_training.Passes` says under the names without `mbconv_`
Shapes:   images [N,C,H,W], norm [5,C], sums [2,C], sums per image [..,N,C]
Dtypes:   images fp32|fp16|bf16, vectors and sums fp32; sums2 is added up in fp64
Layout:   channels_last; vectors without gaps
Tiling:   of the files that hold the kernels; here alone: sums2, BC channels a program
Bytes:    of the passes; the depthwise backward writes dz2 and reads it back, because forming it
          once per tap would cost K * K evaluations of the slope
FLOPs:    of the passes
Source:   original
Truth:    tests/support/reference_passes.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .bn_act import launch_bn_act_bwd, launch_bn_act_fwd, launch_bn_sums
from .dwconv_backward import launch_dwconv_bwd_data, launch_dwconv_bwd_weight
from .dwconv_bn_silu import launch_dwconv_fwd
from .folds import fold_norm, launch_norm
from .launching import empty_fp32, launch
from .pointwise_backward import launch_pointwise_bwd_data, launch_pointwise_bwd_weight
from .pointwise_bn_act import launch_pointwise_fwd
from .squeeze_excite import excite_gradients, launch_squeeze

_CONFIG = {"BN": 32, "BC": 64, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["images", "channels"])
def excite_sums_kernel(
    sums, slopes, gate, q, out, images, channels, BN: tl.constexpr, BC: tl.constexpr
):
    """out [2,C] = sums over n of gate * sums[i + 1] + q * slopes[i]; sums is [3,N,C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_inside = c < channels
    field = tl.program_id(1)
    size = images.to(tl.int64) * channels
    acc = tl.zeros([BN, BC], tl.float64)
    for first in range(0, images, BN):
        n = first + tl.arange(0, BN)
        inside = (n < images)[:, None] & c_inside[None, :]
        at = n.to(tl.int64)[:, None] * channels + c[None, :]
        by_gate = tl.load(sums + (field + 1) * size + at, mask=inside, other=0.0).to(tl.float64)
        by_gate *= tl.load(gate + at, mask=inside, other=0.0)
        by_q = tl.load(slopes + field * size + at, mask=inside, other=0.0).to(tl.float64)
        acc += by_gate + by_q * tl.load(q + at, mask=inside, other=0.0)
    tl.store(out + field * channels + c, tl.sum(acc, 0).to(tl.float32), mask=c_inside)


def _norm(
    partial: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> Tensor:
    """norm [5,C] by the given statistics, by those of the tiles where there are none."""
    if mean is not None and var is not None:
        return launch_norm(weight, bias, mean, var, eps)
    assert partial is not None
    return fold_norm(partial, weight, bias, eps)


def mbconv_expand(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    z, partial = launch_pointwise_fwd(x, weight, statistics=mean is None)
    return z, _norm(partial, bn_weight, bn_bias, mean, var, eps)


def mbconv_depthwise(
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stride: int,
    padding: Sequence[int],
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    z, partial, _ = launch_dwconv_fwd(
        x, weight, stride, padding, in_norm=x_norm, statistics=mean is None,
        activation="identity" if x_norm is None else activation,
    )  # fmt: skip
    return z, _norm(partial, bn_weight, bn_bias, mean, var, eps)


def mbconv_squeeze(z: Tensor, norm: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    sums = launch_squeeze(z, norm=norm, activation=activation)
    return sums[0] / max(1, z.shape[2] * z.shape[3]), sums[1:].clone()


def mbconv_project(
    z2: Tensor,
    norm2: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    z, partial = launch_pointwise_fwd(
        z2, weight, gate=gate, in_norm=norm2, activation=activation, statistics=mean is None
    )
    return z, _norm(partial, bn_weight, bn_bias, mean, var, eps)


def mbconv_finish(
    z: Tensor, norm: Tensor, row_scale: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    """The op of this name."""
    return launch_bn_act_fwd(z, norm, "identity", row_scale=row_scale, residual=residual)


def mbconv_finish_backward(
    grad_y: Tensor, row_scale: Tensor | None, z: Tensor, norm: Tensor, backend: str
) -> Tensor:
    """The op of this name."""
    return launch_bn_sums(grad_y, z, norm, "identity", row_scale=row_scale)


def mbconv_project_backward(
    grad_y: Tensor,
    row_scale: Tensor | None,
    z3: Tensor,
    norm3: Tensor,
    sums3: Tensor | None,
    weight: Tensor,
    z2: Tensor,
    norm2: Tensor,
    gate: Tensor | None,
    wanted: Sequence[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    e, sums, grad_weight = z2.new_empty(0), empty_fp32(z2, 0), empty_fp32(z2, 0)
    if wanted[0]:
        e, by_image = launch_pointwise_bwd_data(
            grad_y, z3, norm3, sums3, weight, activation, row_scale=row_scale, z2=z2, norm2=norm2
        )
        assert by_image is not None
        sums = by_image
    if wanted[1]:
        grad_weight = launch_pointwise_bwd_weight(
            grad_y, z3, norm3, sums3, z2, activation, row_scale=row_scale, in_norm=norm2, gate=gate
        ).view(weight.shape)
    return e, sums, grad_weight


def mbconv_excite_backward(
    sums: Tensor,
    slopes: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pixels: int,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    q, parameters = excite_gradients(
        sums[0], reduce_weight, expand_weight, pooled, hidden, gate, activation, gate_kind
    )
    q.div_(max(1, pixels))
    images, channels = gate.shape
    sums2 = empty_fp32(gate, 2, channels)
    launch(
        excite_sums_kernel, (triton.cdiv(channels, _CONFIG["BC"]), 2), gate.device,
        (sums, slopes, gate, q, sums2, images, channels), _CONFIG,
    )  # fmt: skip
    return q, sums2, *parameters


def mbconv_depthwise_backward(
    e: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    z2: Tensor,
    norm2: Tensor,
    sums2: Tensor | None,
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: Sequence[int],
    wanted: Sequence[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    f, grad_weight, sums = x.new_empty(0), empty_fp32(x, 0), empty_fp32(x, 0)
    dz = launch_bn_act_bwd(e, z2, norm2, activation, sums2, gate=gate, offset=q)
    of_x = "identity" if x_norm is None else activation
    if wanted[0]:
        f, by_channel = launch_dwconv_bwd_data(
            dz, weight, x, stride, padding, norm=x_norm, activation=of_x,
            residual=residual if x_norm is None else None,
        )  # fmt: skip
        sums = sums if by_channel is None else by_channel
    if wanted[1]:
        grad_weight = launch_dwconv_bwd_weight(
            dz, x, weight.shape[-1], stride, padding, norm=x_norm, activation=of_x
        )
    return f, grad_weight, sums


def mbconv_expand_backward(
    f: Tensor,
    z1: Tensor,
    norm1: Tensor,
    sums1: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    grad_x, grad_weight = x.new_empty(0), empty_fp32(x, 0)
    if wanted[0]:
        grad_x, _ = launch_pointwise_bwd_data(
            f, z1, norm1, sums1, weight, "identity", residual=residual
        )
    if wanted[1]:
        grad_weight = launch_pointwise_bwd_weight(f, z1, norm1, sums1, x, "identity")
        grad_weight = grad_weight.view(weight.shape)
    return grad_x, grad_weight
