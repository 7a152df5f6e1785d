"""The tiles of the CUDA kernels of dwconv_bn_silu, run on the CPU and on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch

import tiers
from cases import DWCONV_CASES, DwconvCase, find
from effnet_fast.backends import native
from effnet_fast.ops.cuda import tiles
from effnet_fast.ops.cuda.launching import Bn
from parity import (
    BF16,
    CUDA_BACKENDS,
    CUDA_NAMES,
    FP32,
    MODES,
    NEEDS_SIMT,
    Dtypes,
    assert_same,
    check,
    dwconv_call,
    run,
    runs,
)

case = functools.partial(find, DWCONV_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", CUDA_BACKENDS)
ANY_RUN = runs(names=CUDA_NAMES)
WITH_TABLE_TILES = pytest.mark.usefixtures("table_tiles")

# Widths of one tile and more, for every row of the table.
WIDTHS = (7, 8, 11, 14, 16, 19, 24, 28, 38, 48, 56, 75, 112, 130)


@runs(names=CUDA_NAMES)
@WITH_TABLE_TILES
@pytest.mark.parametrize("c", [pytest.param(24, marks=pytest.mark.slow), *tiers.some([64], [])])
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


@runs((FP32, BF16), CUDA_NAMES)
@WITH_TABLE_TILES
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


@ANY_RUN
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
