"""Least squares whose unknowns may not be below 0."""

from __future__ import annotations

import numpy


def solve_nonnegative(matrix: numpy.ndarray, target: numpy.ndarray) -> numpy.ndarray:
    """x with no entry below 0 that makes |matrix x - target| least.

    Args:
        matrix: [rows, columns], fp64.
        target: [rows], fp64.

    Source: Lawson & Hanson, Solving Least Squares Problems (1974), algorithm 23.10.
    """
    scale = numpy.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    x = numpy.zeros(matrix.shape[1])
    free = numpy.zeros(matrix.shape[1], dtype=bool)
    tolerance = 1e-12 * max(1.0, float(numpy.linalg.norm(target)))
    for _ in range(3 * len(x)):  # rounding could make it go in circles
        if free.all():
            break
        slope = matrix.T @ (target - matrix @ x)
        slope[free] = -numpy.inf
        if slope.max() <= tolerance:
            break
        free[slope.argmax()] = True
        while True:
            trial = numpy.zeros_like(x)
            trial[free] = numpy.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if trial[free].min() > 0:
                x = trial
                break
            shrinking = free & (trial <= 0)
            step = (x[shrinking] / (x[shrinking] - trial[shrinking])).min()
            x = x + step * (trial - x)
            free &= x > tolerance
            x[~free] = 0.0
            if not free.any():
                break
    return x / scale
