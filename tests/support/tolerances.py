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
SILU_BIAS = 0.1  # mean relative error of SiLU in eps of float32; torch's is below 0.02

# tests/csrc/driver.cpp compares with its own loops in double: errors in fp32 as a share of the
# tensor's largest value, and bf16's rounding as a share of the element (half an eps, 2^-8).
DRIVER_FP32 = 3e-6
DRIVER_BF16 = 4e-3

# tests/csrc/silu_driver.cpp: errors in ulp of float32, a little above the largest of all floats,
# which docs/reliability.md has. Without FMA x * log2(e) loses digits as |x| grows; the slope loses
# them where 1 - s does. What is stored as bf16 errs by 1.47e-4 at most: 8.6e-5 of the cubic, and
# 6.1e-5 that any CPU's reciprocal may have.
_SILU_ULP_FMA = {"sigmoid": 3.5, "silu": 5.0, "slope": 9.0, "stored_fp32": 25.0}
_SILU_ULP_AVX512 = _SILU_ULP_FMA | {"stored_bf16": 2500.0}
SILU_ULP = {
    "generic": dict.fromkeys(("sigmoid", "silu", "slope", "stored_fp32"), 50.0),
    "avx2": _SILU_ULP_FMA,
    "neon": _SILU_ULP_FMA,
    "avx512": _SILU_ULP_AVX512,
    "avx512_bf16": _SILU_ULP_AVX512,
}


def rms_and_max(tensor: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute value in float64; zeros for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    tensor = tensor.double()
    rms = torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5
    return rms.item(), torch.linalg.vector_norm(tensor, float("inf")).item()


def assert_same_places(actual: Tensor, stock: Tensor) -> None:
    """Asserts that NaN and both infinities stand in the same places."""
    for name, where in (
        ("NaN", (actual.isnan(), stock.isnan())),
        ("+inf", (actual.isposinf(), stock.isposinf())),
        ("-inf", (actual.isneginf(), stock.isneginf())),
    ):
        differ = where[0] != where[1]
        assert not differ.any(), (
            f"{name} at {int(where[0].sum())} places where stock has {int(where[1].sum())}; "
            f"{int(differ.sum())} differ, the first at {tuple(differ.nonzero()[0].tolist())}"
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
        f"shapes: actual {list(actual.shape)}, stock {list(stock.shape)}, exact {list(exact.shape)}"
    )
    assert actual.dtype == stock.dtype, f"actual is {actual.dtype}, stock {stock.dtype}"
    eps = EPS_FLOOR * torch.finfo(dtype or actual.dtype).eps
    finite = actual.isfinite() & stock.isfinite() & exact.isfinite()
    if not finite.all():
        assert_same_places(actual, stock)
        actual, stock, exact = actual[finite], stock[finite], exact[finite]
    actual, stock = actual.double(), stock.double()
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


def dense_strides(tensor: Tensor) -> list[tuple[int, int]]:
    """(dimension, stride) where the stride means something: dimensions of more than one element."""
    if tensor.numel() == 0:
        return []
    return [(d, s) for d, s in enumerate(tensor.stride()) if tensor.shape[d] > 1]


def assert_parity(
    actual: dict[str, Tensor],
    stock: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    strides: bool = False,
) -> None:
    """Holds every tensor by name to the rule of parity; integer tensors must be equal.

    Args:
        actual, stock, exact: results of one run each; gradients are named "grad NAME".
        dtype: the tested dtype, None for each tensor's own.
        strides: whether they must be stock's, too.
    """
    assert list(actual) == list(stock) == list(exact)
    for name, tensor in actual.items():
        factor = GRADIENT_FACTOR if name.startswith("grad ") else OUTPUT_FACTOR
        try:
            if tensor.is_floating_point():
                assert_no_worse_than(tensor, stock[name], exact[name], factor, dtype=dtype)
            else:
                assert tensor.dtype == stock[name].dtype
                assert torch.equal(tensor, stock[name])
            if strides:
                assert dense_strides(tensor) == dense_strides(stock[name]), "strides differ"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _ratio(error: float, of: float) -> str:
    return f"{error / of:.3g}x" if of else "infinitely more"
