"""dwconv_bn_silu on the CUDA kernels, run on the CPU and on a GPU, against the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cases import DWCONV_CASES, LARGE_DWCONV_CASES, DwconvCase, find
from drawn import DRAWS
from effnet_fast import ops
from effnet_fast.backends import native
from effnet_fast.ops.cuda import dwconv_bn_silu as launcher
from effnet_fast.ops.cuda import tiles
from effnet_fast.ops.cuda.launching import Bn
from effnet_fast.ops.dwconv_bn_silu import apply
from parity import (
    BF16,
    CUDA_BACKENDS,
    CUDA_DTYPES,
    FP16,
    FP32,
    MODES,
    NEEDS_SIMT,
    Call,
    Dtypes,
    Results,
    assert_parity,
    assert_same,
    check,
    device_of,
    dwconv_call,
    on_device,
    run,
)
from tolerances import assert_no_worse_than

case = functools.partial(find, DWCONV_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", CUDA_BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16, FP16], ids=str)
SUPPORTED = [c for c in DWCONV_CASES if c.values[0].k in tiles.KERNELS]


@pytest.fixture
def table_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of as many bands and images as the table says, whether or not they fill a device."""
    monkeypatch.setattr(tiles, "BLOCKS", 1)
    launcher._plan.cache_clear()
    yield
    launcher._plan.cache_clear()


WITH_TABLE_TILES = pytest.mark.usefixtures("table_tiles")


@functools.lru_cache(maxsize=2)
def expectation(
    case: DwconvCase, dtypes: Dtypes, training: bool, autograd: bool
) -> tuple[Call, Results, Results]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = dwconv_call(case, dtypes, training)
    wanted = None if autograd else ()
    return call, run(call, wanted=wanted), run(call, double=True, wanted=wanted)


@ANY_BACKEND
@pytest.mark.parametrize("dtypes", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("autograd", [False, True], ids=["no_grad", "grad"])
@MODES
@pytest.mark.parametrize("case", [c for c in SUPPORTED if c.values[0].c > 1])
def test_matches_reference(
    case: DwconvCase, training: bool, autograd: bool, dtypes: Dtypes, backend: str
) -> None:
    call, stock, exact = expectation(case, dtypes, training, autograd)
    actual = run(call, backend, wanted=None if autograd else ())
    assert_parity(actual, stock, exact, dtypes.x)


@ANY_BACKEND
@ANY_DTYPE
@pytest.mark.parametrize(
    ("training", "wanted"), [(False, ()), (True, None)], ids=["eval-no_grad", "train-grad"]
)
@pytest.mark.parametrize("case", LARGE_DWCONV_CASES)
def test_matches_reference_where_large(
    case: DwconvCase, training: bool, wanted: tuple[str, ...] | None, dtypes: Dtypes, backend: str
) -> None:
    check(dwconv_call(case, dtypes, training), backend, wanted=wanted)


@ANY_BACKEND
@ANY_DTYPE
@MODES
def test_one_channel(training: bool, dtypes: Dtypes, backend: str) -> None:
    """A vector over one channel is one number, whose error is chance: the rule takes 32 of them."""
    call = dwconv_call(case("c_one"), dtypes, training)
    draws = torch.Generator().manual_seed(2)
    rows: tuple[list[Results], ...] = ([], [], [])
    for _ in range(32):
        x = torch.randn(call.x.shape, generator=draws).to(call.x.dtype)
        drawn = call.with_tensors(x=x.contiguous(memory_format=torch.channels_last))
        rows[0].append(run(drawn, backend))
        rows[1].append(run(drawn))
        rows[2].append(run(drawn, double=True))
    stacked = ({name: torch.stack([r[name] for r in row]) for name in row[0]} for row in rows)
    assert_parity(*stacked, dtypes.x)


# Widths of one tile and more, for every row of the table.
WIDTHS = (7, 8, 11, 14, 16, 19, 24, 28, 38, 48, 56, 75, 112, 130)


@ANY_BACKEND
@ANY_DTYPE
@WITH_TABLE_TILES
@pytest.mark.parametrize("c", [24, 64])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_tile(width: int, k: int, stride: int, c: int, dtypes: Dtypes, backend: str) -> None:
    """Images of several bands and column tiles, in blocks that go through several images.

    At stride 2 the width is one of y, for the forward pass, and one of x, for backward.
    """
    n = 5 if width < 20 else 2
    call = dwconv_call(DwconvCase("tile", n, c, 13, width * stride, k, stride), dtypes, True)
    check(call.with_options(training=False), backend, wanted=())
    if stride == 2:
        call = dwconv_call(DwconvCase("tile", n, c, 13, width, k, stride), dtypes, True)
    check(call, backend)


def test_the_widths_reach_every_row() -> None:
    for rows in tiles.TILES.values():
        reached = {next(row for row in rows if width <= row.width) for width in WIDTHS}
        assert reached == set(rows)


@ANY_BACKEND
@WITH_TABLE_TILES
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
@pytest.mark.parametrize("c", [8, 24, 33, 40, 64, 130])
def test_every_width_of_a_block_of_channels(c: int, dtypes: Dtypes, backend: str) -> None:
    drawn = DwconvCase("channels", 3, c, 9, 16, 3)
    lanes = tiles.lanes_for(c, dtypes.x.itemsize)
    assert lanes in tiles.LANES[dtypes.x.itemsize]
    check(dwconv_call(drawn, dtypes, training=True), backend)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that starts 2 or 4 bytes after a multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 1)
    alike = memory[1:].as_strided(tensor.shape, tensor.stride(), 1)
    return alike.copy_(tensor)


@ANY_BACKEND
@ANY_DTYPE
@MODES
@WITH_TABLE_TILES
@pytest.mark.parametrize("name", ["c_eq_vector", "c_gt_block_stride_2", "w_gt_strip"])
def test_unaligned_and_strided_input(
    name: str, training: bool, dtypes: Dtypes, backend: str
) -> None:
    call = dwconv_call(case(name), dtypes, training)
    expected = run(call, backend)
    grad_y = torch.randn(expected["y"].shape).to(dtypes.x)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    expected = run(call, backend, grad_y=grad_y)
    wide = torch.zeros(*call.x.shape[:2], call.x.shape[2] + 1, call.x.shape[3] + 2)
    wide = wide.to(dtypes.x).contiguous(memory_format=torch.channels_last)
    sliced = wide[:, :, 1:, 1:-1].copy_(call.x)
    assert_same(run(call.with_tensors(x=shifted(call.x)), backend, grad_y=grad_y), expected)
    actual = run(call.with_tensors(x=sliced), backend, grad_y=shifted(grad_y))
    assert_same(actual, expected)


@NEEDS_SIMT
def test_parity_notices_a_wrong_tap() -> None:
    call = dwconv_call(case("b0_c240_28_k5_s1"))
    stock, exact = run(call), run(call, double=True)
    weight = call.tensors["weight"].clone()
    weight[3, 0, 0, 4] += 1e-3
    actual = run(call.with_tensors(weight=weight), "simt")
    for name in ("y", "grad x", "grad bn_weight"):
        with pytest.raises(AssertionError, match=name):
            assert_parity(*({name: r[name]} for r in (actual, stock, exact)), torch.float32)


@ANY_BACKEND
@ANY_DTYPE
@WITH_TABLE_TILES
@pytest.mark.parametrize("name", ["7x9", "c_gt_block_stride_2", "h_gt_chunk", "one_pixel"])
def test_pooled_mean_of_y(name: str, dtypes: Dtypes, backend: str) -> None:
    """The mean over H and W that squeeze-and-excite takes from the eval kernel."""
    call = dwconv_call(case(name), dtypes)
    pad = (call.options["padding"] or (call.tensors["weight"].shape[-1] - 1) // 2,) * 4
    options = (call.options["stride"], pad, False, 0.1, 1e-5, backend)
    device = device_of(backend, call.x)
    y, pooled = apply(*(on_device(t, device) for t in call.tensors.values()), *options)
    y, pooled = y.cpu(), pooled.cpu()
    exact = run(call, double=True, wanted=())["y"].mean((2, 3))
    stock = F.adaptive_avg_pool2d(run(call, wanted=())["y"], 1).flatten(1).float()
    assert_no_worse_than(pooled, stock, exact, dtype=dtypes.x)
    assert_no_worse_than(pooled, y.float().mean((2, 3)), y.double().mean((2, 3)))


@ANY_BACKEND
@ANY_DTYPE
@MODES
@pytest.mark.parametrize("absent", [("bn_weight",), ("bn_bias",), ("bn_weight", "bn_bias")])
def test_absent_vectors(
    absent: tuple[str, ...], training: bool, dtypes: Dtypes, backend: str
) -> None:
    call = dwconv_call(case("c_odd"), dtypes, training).with_tensors(**dict.fromkeys(absent))
    check(call, backend)
    check(call, backend, wanted=())


@ANY_BACKEND
@MODES
def test_frozen_subsets_change_no_number(training: bool, backend: str) -> None:
    call = dwconv_call(case("h_gt_chunk_k5_stride_2"), BF16, training)
    every = run(call, backend)
    for count in range(1, len(call.differentiable)):
        for wanted in itertools.combinations(call.differentiable, count):
            assert_same(run(call, backend, wanted=wanted), every)


@ANY_BACKEND
@pytest.mark.parametrize(("dtypes", "mean"), [(FP32, 1000.0), (BF16, 8.0), (FP16, 60.0)], ids=str)
@pytest.mark.parametrize("name", ["b0_c96_112_k3_s2", "batch_gt_groups", "w_gt_strip"])
def test_statistics_far_from_zero(name: str, dtypes: Dtypes, mean: float, backend: str) -> None:
    """z has the given mean and a standard deviation of about 1."""
    call = dwconv_call(case(name), dtypes, training=True).with_options(padding=0, momentum=1.0)
    taps = call.tensors["weight"].shape[-1] ** 2
    weight = torch.full_like(call.tensors["weight"], 1 / taps)
    call = call.with_tensors(x=(call.x * taps**0.5 + mean).to(dtypes.x), weight=weight)
    actual = check(call, backend)
    assert abs(actual["running_mean"].mean() - mean) < 0.2
    assert 0.5 < actual["running_var"].mean() < 2


@ANY_BACKEND
@pytest.mark.parametrize("name", ["7x9", "7x9_stride_2", "c_odd"])
@ANY_DTYPE
@MODES
def test_nan_and_inf_in_x(name: str, training: bool, dtypes: Dtypes, backend: str) -> None:
    """They appear where stock has them, in y and statistics, and in the gradients in eval."""
    call = dwconv_call(case(name), dtypes, training)
    x = call.x.clone()
    x[0, 1, 3, 3], x[1, 4, 0, 0], x[1, 5, -1, 2], x[0, 7, 4, 4] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    call = call.with_tensors(x=x)
    actual = check(call, backend, wanted=())
    assert actual["y"].isnan().any()
    if not training:
        check(call, backend)


@ANY_BACKEND
@ANY_DTYPE
def test_nan_and_inf_in_grad_y(dtypes: Dtypes, backend: str) -> None:
    """Away from the border, where every tap meets the image, they appear where stock has them."""
    call = dwconv_call(case("c_odd"), dtypes)
    grad_y = torch.ones_like(call.x)
    grad_y[0, 1, 3, 3], grad_y[1, 4, 4, 5] = float("nan"), float("inf")
    actual = check(call, backend, grad_y=grad_y)
    assert actual["grad x"].isnan().any()
    assert actual["grad weight"][1].isnan().all()


@st.composite
def dwconv_cases(draw: st.DrawFn) -> DwconvCase:
    """Shapes of up to about 10,000 values whose output has at least 64, so that rms means much."""
    k, stride = draw(st.sampled_from(tiles.KERNELS)), draw(st.sampled_from([1, 2]))
    sides = st.integers(0, k + 1)
    padding = draw(st.one_of(st.none(), sides, st.tuples(sides, sides, sides, sides)))
    n, c = draw(st.integers(1, 6)), draw(st.integers(8, 70))
    h, w = draw(st.integers(k, 24)), draw(st.integers(k, 40))
    drawn = DwconvCase("drawn", n, c, h, w, k, stride, padding)
    rest = -(-64 // (c * drawn.values_per_channel)) + (drawn.values_per_channel == 1)
    return dataclasses.replace(drawn, n=n * rest)


@ANY_BACKEND
@ANY_DTYPE
@MODES
@WITH_TABLE_TILES
@DRAWS
def test_drawn_shapes(draws: settings, training: bool, dtypes: Dtypes, backend: str) -> None:
    @draws
    @given(dwconv_cases())
    def examine(drawn: DwconvCase) -> None:
        check(dwconv_call(drawn, dtypes, training), backend)
        if not training:
            check(dwconv_call(drawn, dtypes), backend, wanted=())

    examine()


@NEEDS_SIMT
@MODES
@WITH_TABLE_TILES
@pytest.mark.parametrize("name", ["c_gt_block_stride_2", "h_gt_chunk", "batch_gt_groups"])
def test_the_same_bits_in_any_order_of_threads(name: str, training: bool) -> None:
    call = dwconv_call(case(name), BF16, training)
    results = []
    for seed in range(3):
        native.load_simt().set_seed(seed)
        results.append(run(call, "simt"))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@ANY_BACKEND
def test_two_runs(backend: str) -> None:
    call = dwconv_call(case("c_gt_block_stride_2"), BF16, training=True)
    assert_same(run(call, backend), run(call, backend))


@ANY_BACKEND
@pytest.mark.parametrize("k", [1, 7])
def test_kernels_that_are_not_there(k: int, backend: str) -> None:
    call = dwconv_call(case(f"k{k}"))
    with pytest.raises(RuntimeError, match=f"the kernel is {k}x{k}; {backend} has 3x3 and 5x5"):
        run(call, backend)


def test_vectors_are_taken_in_their_dtype() -> None:
    """Nothing is converted where weight and bias are alike, and mean and variance are."""
    half, single = torch.rand(4, 8).bfloat16(), torch.rand(4, 8)
    for vectors in (half, single, (None, half[0], *single[:2]), (*half[:2], *single[:2])):
        taken = Bn(list(vectors), 1e-3).vectors
        assert all(a is b for a, b in zip(taken, Bn(taken).vectors, strict=True))
        assert all(
            a is None or a.data_ptr() == b.data_ptr() for a, b in zip(vectors, taken, strict=True)
        )
    taken = Bn([half[0], single[0], half[1].double(), half[2].double()]).vectors
    assert {v.dtype for v in taken} == {torch.float32}


def test_simt_is_only_for_those_who_ask() -> None:
    call = dwconv_call(case("c_odd"))
    assert torch.equal(
        ops.dwconv_bn_silu(**call.tensors), ops.dwconv_bn_silu(**call.tensors, backend="cpu")
    )
