"""What each op and network has to do at the least: bytes, operations, SiLUs.

Activations are read and written as often as the plan of effnet_fast/scaling/passes.py with the
fewest bytes has it; parameters once, in training three times.
"""

from __future__ import annotations

from benchmarks.limits import Work
from cases import DwconvCase, MBConvCase, PointwiseCase, SqueezeExciteCase, StemCase
from effnet_fast.models import Variant
from effnet_fast.scaling import PLANS, convolutions, traffic
from effnet_fast.scaling.passes import moved_elements

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PLAN = {"inference": "block_fused", "training": "fast"}
FLOPS_PER_MAC = {"inference": 2, "training": 6}  # forward, and the gradients of data and weight
SILUS = {"inference": 1, "training": 2}  # forward, and its derivative
PARAMETER_PASSES = {"inference": 1, "training": 3}
ACTIVATED = ("stem", "expand", "depthwise", "head")  # what a SiLU follows
UNMATRIX = ("stem", "depthwise")  # convolutions that run at the rate of fp32 multiply-adds


def _out(size: int, stride: int) -> int:
    return -(-size // stride)


def dwconv(case: DwconvCase, mode: str, dtype: str) -> Work:
    """Inference reads x and writes y. Training writes z and y and reads z, then reads grad_y and z
    twice (BN's sums come first), reads x and writes its gradient."""
    x = case.n * case.c * case.h * case.w
    y = case.n * case.c * _out(case.h, case.stride) * _out(case.w, case.stride)
    elements = x + y if mode == "inference" else 2 * x + 7 * y + x
    parameters = case.c * (case.k**2 + 4) * PARAMETER_PASSES[mode]
    return Work(
        bytes=BYTES[dtype] * (elements + parameters),
        other_flops=FLOPS_PER_MAC[mode] * y * case.k**2,
        silus=SILUS[mode] * y,
    )


def dwconv_backward(case: DwconvCase, dtype: str) -> Work:
    """Reads grad_y, z and x once each, writes x's gradient."""
    x = case.n * case.c * case.h * case.w
    y = case.n * case.c * _out(case.h, case.stride) * _out(case.w, case.stride)
    parameters = case.c * (case.k**2 + 4) * 2  # read, and their gradients written
    return Work(
        bytes=BYTES[dtype] * (2 * x + 2 * y + parameters),
        other_flops=4 * y * case.k**2,
        silus=y,
    )


def squeeze_excite(case: SqueezeExciteCase, mode: str, dtype: str) -> Work:
    """Inference reads x and writes y; training does, and then `squeeze_excite_backward`."""
    x = case.n * case.c * case.h * case.w
    weights = 2 * case.c * case.r
    forward = Work(
        bytes=BYTES[dtype] * (2 * x + weights),
        dense_flops=2 * case.n * weights,
        other_flops=2 * x,
    )
    return forward if mode == "inference" else _sum(forward, squeeze_excite_backward(case, dtype))


def squeeze_excite_backward(case: SqueezeExciteCase, dtype: str) -> Work:
    """Reads x and grad_y, writes x's gradient; the weights are read and their gradients written."""
    x, weights = case.n * case.c * case.h * case.w, 2 * case.c * case.r
    return Work(
        bytes=BYTES[dtype] * (3 * x + 2 * weights),
        dense_flops=4 * case.n * weights,
        other_flops=4 * x,
    )


def _sum(a: Work, b: Work) -> Work:
    return Work(
        a.bytes + b.bytes,
        a.dense_flops + b.dense_flops,
        a.other_flops + b.other_flops,
        a.silus + b.silus,
    )


def pointwise(case: PointwiseCase, mode: str, dtype: str) -> Work:
    """Reads x and the residual, writes y."""
    if mode != "inference":
        raise ValueError(f"mode must be inference, got {mode!r}")
    pixels = case.n * case.h * case.w
    elements = pixels * (case.c + case.out * (2 if case.residual else 1)) + case.c * case.out
    return Work(
        bytes=BYTES[dtype] * elements,
        dense_flops=2 * pixels * case.c * case.out,
        silus=pixels * case.out if case.act == "silu" else 0,
    )


def head(case: PointwiseCase, mode: str, dtype: str) -> Work:
    """Inference reads x. Training writes z and reads it, then reads z and x and writes x's
    gradient."""
    pixels = case.n * case.h * case.w
    x, z, weights = pixels * case.c, pixels * case.out, case.c * case.out
    elements = x if mode == "inference" else 3 * x + 3 * z
    return Work(
        bytes=BYTES[dtype] * (elements + weights * PARAMETER_PASSES[mode]),
        dense_flops=FLOPS_PER_MAC[mode] * pixels * weights,
        silus=SILUS[mode] * z,
    )


def stem(case: StemCase, mode: str, dtype: str) -> Work:
    """Inference reads x and writes y. Training writes z and y and reads z, then reads grad_y and z
    twice (BN's sums come first) and x; x has no gradient."""
    x = case.n * case.c * case.h * case.w
    y = case.n * case.out * _out(case.h, case.stride) * _out(case.w, case.stride)
    elements = x + y if mode == "inference" else 2 * x + 7 * y
    parameters = case.out * (case.c * case.k**2 + 4) * PARAMETER_PASSES[mode]
    products = 1 if mode == "inference" else 2  # forward, and the gradient of the weight
    return Work(
        bytes=BYTES[dtype] * (elements + parameters),
        other_flops=2 * products * y * case.c * case.k**2,
        silus=SILUS[mode] * y,
    )


def mbconv(case: MBConvCase, mode: str, dtype: str) -> Work:
    """The passes of one block."""
    size, out = case.n * case.h * case.w, case.n * _out(case.h, case.stride) ** 2
    expands = case.expanded != case.c
    sizes = {"x": size * case.c, "d": out * case.expanded, "y": out * case.out}
    sizes["e"] = size * case.expanded if expands else sizes["x"]
    plan = PLANS[mode, PLAN[mode]].block
    elements = moved_elements(plan, sizes, expands=expands, residual=case.residual)
    weights = case.expanded * (case.out + case.k**2 + 2 * case.r + case.c * expands)
    macs = sizes["e"] * case.c * expands + sizes["d"] * case.out
    return Work(
        bytes=BYTES[dtype] * (elements + weights * PARAMETER_PASSES[mode]),
        dense_flops=FLOPS_PER_MAC[mode] * macs,
        other_flops=FLOPS_PER_MAC[mode] * sizes["d"] * case.k**2,
        silus=SILUS[mode] * (sizes["e"] * expands + sizes["d"]),
    )


def network(variant: Variant, resolution: int, batch: int, mode: str, dtype: str) -> Work:
    """All passes of a network; the classifier and squeeze-and-excitation included."""
    size = BYTES[dtype]
    rows = traffic(
        *(variant, mode, PLAN[mode], resolution), batch=batch, element_size=size, weight_size=size
    )
    convs = list(convolutions(variant, resolution))
    macs = {
        unmatrix: sum(c.repeats * c.macs for c in convs if (c.kind in UNMATRIX) == unmatrix)
        for unmatrix in (False, True)
    }
    activated = ACTIVATED if variant.activation == "silu" else ()  # a clamp costs next to nothing
    silus = sum(c.repeats * c.activations for c in convs if c.kind in activated)
    return Work(
        bytes=sum(row.bytes for row in rows),
        dense_flops=FLOPS_PER_MAC[mode] * batch * macs[False],
        other_flops=FLOPS_PER_MAC[mode] * batch * macs[True],
        silus=SILUS[mode] * batch * silus,
    )
