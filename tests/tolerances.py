"""The rule of parity: how far a result may be from the exact one, judged by how far stock is.

Element by element two layouts of stock PyTorch already differ by more than any useful bound; per
tensor their errors are alike. So rms and max of |actual - exact| may be `factor` times those of
|stock - exact|, plus EPS_FLOOR eps of the tested dtype times rms and max of |exact|.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0  # outputs and running statistics
GRADIENT_FACTOR = 3.0  # gradients: longer sums, and more of them
EPS_FLOOR = 2.0


def rms_and_max(tensor: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute value in float64; zeros for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    tensor = tensor.double().abs()
    largest = tensor.max().item()
    # Divided first: squares of large values would overflow.
    rms = (tensor / largest).square().mean().sqrt().item() * largest if largest else 0.0
    return rms, largest


def _assert_same_places(name: str, actual: Tensor, stock: Tensor) -> None:
    differ = actual != stock
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} at {int(actual.sum())} places where stock has {int(stock.sum())}; "
            f"{int(differ.sum())} differ, the first at {first}"
        )


def assert_no_worse_than(
    actual: Tensor,
    stock: Tensor,
    exact: Tensor,
    factor: float = OUTPUT_FACTOR,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Holds `actual` to the rule of parity.

    Args:
        actual, stock: what is tested and what stock PyTorch gives, of one shape and dtype.
        exact: the same computed in float64 from the same inputs.
        factor: OUTPUT_FACTOR or GRADIENT_FACTOR.
        dtype: the tested dtype, whose eps sets the floor; None means that of `actual`.

    Raises:
        AssertionError: shape or dtype differ, NaN or an infinity stands where stock has none or
            is missing where it has one, or an error is too large; the text gives the ratios.
    """
    assert actual.shape == stock.shape == exact.shape, (
        f"shapes: actual {list(actual.shape)}, stock {list(stock.shape)}, "
        f"exact {list(exact.shape)}"
    )
    assert actual.dtype == stock.dtype, f"actual is {actual.dtype}, stock {stock.dtype}"
    _assert_same_places("NaN", actual.isnan(), stock.isnan())
    for name, value in (("+inf", float("inf")), ("-inf", float("-inf"))):
        _assert_same_places(name, actual == value, stock == value)

    eps = EPS_FLOOR * torch.finfo(dtype or actual.dtype).eps
    finite = actual.isfinite() & exact.isfinite()
    actual, stock, exact = (tensor[finite].double() for tensor in (actual, stock, exact))
    errors, allowances = rms_and_max(actual - exact), rms_and_max(stock - exact)
    measures = zip(("rms", "max"), errors, allowances, rms_and_max(exact), strict=True)
    failures = [
        f"{name} error {error:.3e} exceeds {factor:g} x {of_stock:.3e} (stock's) + {eps:.1e} x "
        f"{size:.3e} (|exact|): {_ratio(error, of_stock)} of stock's error, "
        f"{_ratio(error, factor * of_stock + eps * size)} of what is allowed"
        for name, error, of_stock, size in measures
        if not error <= factor * of_stock + eps * size
    ]
    assert not failures, "; ".join(failures)


def _ratio(error: float, of: float) -> str:
    return f"{error / of:.3g}x" if of else "infinitely more"
