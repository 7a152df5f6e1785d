"""Functions of one element, and loads of vectors over channels, that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def silu(u):
    return u / (1.0 + tl.exp(-u))


@triton.jit
def silu_grad(u):
    s = 1.0 / (1.0 + tl.exp(-u))
    return s * (1.0 + u * (1.0 - s))


@triton.jit
def clamp(u, lo, hi):
    """u between lo and hi, a bound that is None or NaN bounding nothing; NaN stays NaN."""
    if lo is not None:
        u = tl.where(u < lo, lo, u)
    if hi is not None:
        u = tl.where(u > hi, hi, u)
    return u


@triton.jit
def activated(u, lo, hi, ACT: tl.constexpr):
    """act(u), by what `launching.activation_constants` makes of the activation's name."""
    if ACT == "silu":
        return silu(u)
    else:
        return clamp(u, lo, hi)


@triton.jit
def activation_slope(u, lo, hi, ACT: tl.constexpr):
    """act'(u): of a clamp 0 at a bound, 1 for NaN."""
    if ACT == "silu":
        return silu_grad(u)
    else:
        slope = tl.full(u.shape, 1.0, tl.float32)
        if lo is not None:
            slope = tl.where(u <= lo, 0.0, slope)
        if hi is not None:
            slope = tl.where(u >= hi, 0.0, slope)
        return slope


@triton.jit
def grad_through(grad, u, lo, hi, ACT: tl.constexpr):
    """u's gradient from that of act(u): behind a bound 0, whatever grad is, as PyTorch's."""
    if ACT == "silu":
        return grad * silu_grad(u)
    else:
        if lo is not None:
            grad = tl.where(u <= lo, 0.0, grad)
        if hi is not None:
            grad = tl.where(u >= hi, 0.0, grad)
        return grad


@triton.jit
def activated_with_slope(u, lo, hi, ACT: tl.constexpr):
    """act(u) and act'(u), with what they share formed once."""
    if ACT == "silu":
        s = sigmoid(u)
        return u * s, s * (1.0 + u * (1.0 - s))
    else:
        return clamp(u, lo, hi), activation_slope(u, lo, hi, ACT)


@triton.jit
def gate_of(logit, GATE: tl.constexpr):
    """The gate: sigmoid(logit), or clamp(logit + 3, 0, 6) / 6."""
    if GATE == "sigmoid":
        return sigmoid(logit)
    else:
        return clamp(logit + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def grad_through_gate(grad, gate, GATE: tl.constexpr):
    """The logit's gradient from the gate's."""
    if GATE == "sigmoid":
        return grad * gate * (1.0 - gate)
    else:
        return tl.where((gate > 0.0) & (gate < 1.0), grad * (1.0 / 6.0), 0.0)


@triton.jit
def load_vector(vector, c, mask, absent: tl.constexpr):
    """vector[c] in fp32, `absent` where there is none or c is masked."""
    if vector is None:
        return tl.full(c.shape, absent, tl.float32)
    else:
        return tl.load(vector + c, mask=mask, other=absent).to(tl.float32)


@triton.jit
def load_norm(norm, channels, c, mask):
    """scale, shift, mean and rstd of channels c: norm is [5,C] as `folds.launch_norm` says."""
    scale = tl.load(norm + c, mask=mask, other=0.0)
    shift = tl.load(norm + channels + c, mask=mask, other=0.0)
    mean = tl.load(norm + 2 * channels + c, mask=mask, other=0.0)
    return scale, shift, mean, tl.load(norm + 3 * channels + c, mask=mask, other=0.0)


@triton.jit
def reciprocal_std(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def load_affine(weight, bias, mean, var, eps, c, mask):
    """mean, scale and shift of BN: u = (z - mean) * scale + shift, exact for a large mean too."""
    rstd = reciprocal_std(load_vector(var, c, mask, 1.0), eps)
    scale = rstd * load_vector(weight, c, mask, 1.0)
    return load_vector(mean, c, mask, 0.0), scale, load_vector(bias, c, mask, 0.0)


@triton.jit
def add_exactly(total, rest, x):
    """total + x, and the rest with what rounding took from it (Knuth's two-sum)."""
    new = total + x
    added = new - total
    return new, rest + ((total - (new - added)) + (x - added))


@triton.jit
def sum_rows(x, rest):
    """Sums [C] of x + rest [P,C] in fp32, added up in fp64; no rest where x is infinite."""
    rest = tl.where(rest == rest, rest, 0.0)
    return tl.sum(x.to(tl.float64) + rest, 0).to(tl.float32)


@triton.jit
def tile_statistics(z, mask, count):
    """mean, M2 and what rounding took from the mean, over axis 0 of z [P,C].

    Of the `count` values where mask [P,C] holds.
    """
    mean = tl.sum(tl.where(mask, z, 0.0), 0) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, z - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0) / tl.maximum(count, 1.0)
    return mean, tl.sum(deviation * deviation, 0) - count * rest * rest, rest


@triton.jit
def store_statistics(partial, tile, count, mean, squares, rest, channels, c, mask):
    """Writes a tile's count, mean, M2 and rest [C] to partial [tiles,4,C]."""
    out = partial + tile.to(tl.int64) * 4 * channels + c
    tl.store(out, tl.full(c.shape, 0.0, tl.float32) + count, mask=mask)
    tl.store(out + channels, mean, mask=mask)
    tl.store(out + 2 * channels, squares, mask=mask)
    tl.store(out + 3 * channels, rest, mask=mask)
