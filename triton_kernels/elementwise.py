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
