"""dwconv_bn_silu on interpreted Triton kernels against its reference."""

from __future__ import annotations

import pytest
import torch

from cases import DWCONV_CASES, DwconvCase, find
from effnet_fast.triton_kernels.bn_act import launch_bn_sums
from effnet_fast.triton_kernels.folds import launch_norm
from parity import FP32, MODES, Dtypes, channels_last, check, dwconv_call
from tiers import some

FP16 = Dtypes(torch.float16, torch.float16)
MIXED = Dtypes(torch.float16, torch.float32)
# One of each kind: an interpreted kernel takes seconds where a compiled one takes microseconds.
NAMES = (
    "c_odd",
    "c_one",
    "c_gt_block",
    "7x9_stride_2",
    "h_lt_kernel",
    "w_lt_kernel",
    "one_pixel",
    "same_k5_stride_2",
    "four_sides",
    "padding_gt_kernel",
    "no_padding",
    "unread_border_stride_2",
    "k1_stride_2",
    "batch_0",
)
HALF = ("c_odd", "7x9_stride_2", "four_sides", "no_padding")
KEPT = ("c_one", "unread_border_stride_2", "batch_0")


def case_of(name: str) -> DwconvCase:
    return find(DWCONV_CASES, name)


@MODES
@pytest.mark.parametrize("name", some(NAMES, KEPT))
def test_matches_reference(name: str, training: bool) -> None:
    check(dwconv_call(case_of(name), FP32, training), "triton")


@pytest.mark.parametrize("name", some(NAMES, KEPT))
def test_inference_matches_reference(name: str) -> None:
    check(dwconv_call(case_of(name), FP32), "triton", wanted=())


@MODES
@pytest.mark.parametrize("dtypes", some((FP16, MIXED), (FP16,)))
@pytest.mark.parametrize("name", some(HALF, ("no_padding",)))
def test_fp16_matches_reference(name: str, dtypes: Dtypes, training: bool) -> None:
    check(dwconv_call(case_of(name), dtypes, training), "triton")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtypes", some((FP16, MIXED), (FP16,)))
def test_fp16_inference_matches_reference(dtypes: Dtypes) -> None:
    check(dwconv_call(case_of("four_sides"), dtypes), "triton", wanted=())


@pytest.mark.exhaustive
def test_large_kernel_matches_reference() -> None:
    check(dwconv_call(case_of("k9_stride_2_four_sides"), FP32, True), "triton", wanted=("x",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("absent", [("bn_weight",), ("bn_bias",), ("bn_weight", "bn_bias")])
def test_absent_parameters(absent: tuple[str, ...]) -> None:
    call = dwconv_call(case_of("7x9_stride_2"), FP32, True)
    check(call.with_tensors(**dict.fromkeys(absent)), "triton")


@pytest.mark.exhaustive
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bn_bias",), ("x", "bn_weight")])
def test_pruned_gradients(wanted: tuple[str, ...]) -> None:
    check(dwconv_call(case_of("7x9_stride_2"), FP32, True), "triton", wanted=wanted)


@pytest.mark.exhaustive
def test_strided_input() -> None:
    """x cut out of a larger image: strides over N, H and W, channels innermost."""
    call = dwconv_call(case_of("padding_gt_kernel"), FP32, True)
    n, c, h, w = call.x.shape
    larger = torch.randn(n + 1, c, h + 3, w + 2).contiguous(memory_format=torch.channels_last)
    cut = larger[1:, :, 2 : h + 2, 1 : w + 1]
    check(call.with_tensors(x=cut), "triton")
    check(call.with_tensors(x=cut).with_options(training=False), "triton", wanted=())


def test_an_infinite_gradient_reaches_the_sums() -> None:
    """What rounding took from a sum is no number where the sum is infinite."""
    z, grad = (channels_last(torch.randn(2, 8, 7, 6)) for _ in range(2))
    grad[0, 3, 2, 1] = float("inf")
    norm = launch_norm(None, None, torch.zeros(8), torch.ones(8), 0.0)
    sums = launch_bn_sums(grad, z, norm, "identity")
    exact = torch.stack([grad.sum((0, 2, 3)), (grad * z).sum((0, 2, 3))])
    assert torch.isinf(exact).sum() == 2
    torch.testing.assert_close(sums, exact)


LARGE_MEANS = pytest.mark.parametrize(("mean", "dtypes"), [(1000.0, FP32), (8.0, FP16)])


@pytest.mark.exhaustive
@LARGE_MEANS
def test_large_mean_in_folds_of_several_levels(
    mean: float, dtypes: Dtypes, two_parts_a_run: list[int]
) -> None:
    test_large_mean(mean, dtypes)
    assert max(two_parts_a_run) > 2


@LARGE_MEANS
def test_large_mean(mean: float, dtypes: Dtypes) -> None:
    """Variance survives a mean that is large beside the deviation."""
    call = dwconv_call(case_of("no_padding"), dtypes, True)
    weight = torch.zeros_like(call.tensors["weight"])
    weight[:, :, 1, 1] = 1.0
    check(call.with_tensors(x=call.x + mean, weight=weight), "triton", wanted=())
