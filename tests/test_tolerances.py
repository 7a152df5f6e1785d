"""The rule of parity passes what it should and fails every planted fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tolerances import GRADIENT_FACTOR, assert_no_worse_than, assert_parity

ERROR = 1e-4  # stock's, relative to values of about 1, far above the eps of float32


@pytest.fixture
def trio() -> tuple[Tensor, Tensor, Tensor]:
    """actual, stock and exact [4,8,5,5], the first two equally far from the third."""
    exact = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    noise = (ERROR * torch.randn(2, *exact.shape).clamp(-2, 2)).double()
    return (exact + noise[0]).float(), (exact + noise[1]).float(), exact


def test_passes_equal_errors(trio: tuple[Tensor, ...]) -> None:
    assert_no_worse_than(*trio)


def test_passes_rounding_where_stock_is_exact() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    assert_no_worse_than(exact.bfloat16(), exact.bfloat16(), exact)
    exact = exact.float().double()
    assert_no_worse_than(exact.float() * (1 + 2e-7), exact.float(), exact)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
def test_scale_does_not_matter(trio: tuple[Tensor, ...], scale: float) -> None:
    actual, stock, exact = (tensor * scale for tensor in trio)
    assert_no_worse_than(actual, stock, exact)
    with pytest.raises(AssertionError, match="rms error"):
        assert_no_worse_than(actual + 10 * ERROR * scale, stock, exact)


def test_fails_one_wrong_element(trio: tuple[Tensor, ...]) -> None:
    actual, stock, exact = trio
    actual[1, 2, 3, 4] += 10 * ERROR
    with pytest.raises(AssertionError, match=r"^max error .*x of stock's error"):
        assert_no_worse_than(actual, stock, exact)


def test_fails_a_small_bias(trio: tuple[Tensor, ...]) -> None:
    actual, stock, exact = trio
    with pytest.raises(AssertionError, match=r"rms error .*x of what is allowed"):
        assert_no_worse_than(actual + 2.5 * ERROR, stock, exact)


def test_fails_swapped_channels(trio: tuple[Tensor, ...]) -> None:
    actual, stock, exact = trio
    actual[:, [0, 1]] = actual[:, [1, 0]]
    with pytest.raises(AssertionError, match="rms error"):
        assert_no_worse_than(actual, stock, exact)


def test_factor(trio: tuple[Tensor, ...]) -> None:
    _, stock, exact = trio
    actual = (exact + 2.5 * (stock - exact)).float()
    assert_no_worse_than(actual, stock, exact, factor=GRADIENT_FACTOR)
    with pytest.raises(AssertionError, match=r"2\.5x of stock's error"):
        assert_no_worse_than(actual, stock, exact)


def test_tested_dtype_sets_the_floor() -> None:
    exact = torch.randn(100, dtype=torch.float64).float().double()
    stock, actual = exact.float(), (exact * 1.01).float()
    assert_no_worse_than(actual, stock, exact, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="of what is allowed"):
        assert_no_worse_than(actual, stock, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_places_of_nan_and_inf(trio: tuple[Tensor, ...], value: float) -> None:
    actual, stock, exact = trio
    stock[0, 0, 0, 0] = value
    exact[0, 0, 0, 0] = value
    with pytest.raises(AssertionError, match=r"0 places .* stock has 1; .*\(0, 0, 0, 0\)"):
        assert_no_worse_than(actual, stock, exact)
    actual[0, 0, 0, 0] = value
    assert_no_worse_than(actual, stock, exact)
    actual[1, 0, 0, 0] = value
    with pytest.raises(AssertionError, match=r"2 places .* stock has 1; .*\(1, 0, 0, 0\)"):
        assert_no_worse_than(actual, stock, exact)


def test_shape_and_dtype(trio: tuple[Tensor, ...]) -> None:
    actual, stock, exact = trio
    with pytest.raises(AssertionError, match="shapes: actual"):
        assert_no_worse_than(actual[:1], stock, exact)
    with pytest.raises(AssertionError, match=r"actual is .*bfloat16, stock .*float32"):
        assert_no_worse_than(actual.bfloat16(), stock, exact)


def test_results_by_name(trio: tuple[Tensor, ...]) -> None:
    """Gradients have a factor of their own, integers are equal, strides where asked for."""
    _, stock, exact = trio
    actual, count = (exact + 2.5 * (stock - exact)).float(), torch.tensor(3)

    def groups(name: str, *tensors: Tensor) -> list[dict[str, Tensor]]:
        return [{name: t, "count": count} for t in tensors]

    assert_parity(*groups("grad x", actual, stock, exact))
    with pytest.raises(AssertionError, match=r"^y: rms error"):
        assert_parity(*groups("y", actual, stock, exact))
    with pytest.raises(AssertionError, match="count"):
        assert_parity({"count": count}, {"count": count + 1}, {"count": count})
    last = stock.contiguous(memory_format=torch.channels_last)
    assert_parity(*groups("y", last, stock, exact))
    with pytest.raises(AssertionError, match="y: strides differ"):
        assert_parity(*groups("y", last, stock, exact), strides=True)


def test_empty() -> None:
    assert_no_worse_than(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double())
