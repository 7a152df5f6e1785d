"""Least squares without negative unknowns, against trying every choice of those that are 0."""

from __future__ import annotations

import itertools

import numpy
import pytest

from effnet_fast.scaling.least_squares import solve_nonnegative


def test_least_squares_against_every_choice_of_free_entries() -> None:
    draws = numpy.random.default_rng(1)
    for number in range(120):
        matrix, target = draws.standard_normal((8, 4)), draws.standard_normal(8)
        if number % 2:  # columns that depend on each other: what was free may have to be 0 again
            matrix = matrix @ draws.standard_normal((4, 4))
        found = solve_nonnegative(matrix, target)
        assert found.min() >= 0
        best = float(target @ target)
        for size in range(1, 5):
            for free in itertools.combinations(range(4), size):
                x = numpy.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
                if x.min() >= 0:
                    rest = matrix[:, free] @ x - target
                    best = min(best, float(rest @ rest))
        rest = matrix @ found - target
        assert float(rest @ rest) == pytest.approx(best, rel=1e-9)


def test_least_squares_takes_columns_of_zeros() -> None:
    found = solve_nonnegative(numpy.array([[0.0, 2.0], [0.0, 2.0]]), numpy.ones(2))
    assert found.tolist() == pytest.approx([0.0, 0.5])
