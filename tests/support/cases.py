"""The shapes that the ops are tested on: the only table of them.

A case's name says what it covers. "c" is the number of channels; a vector holds up to 16 of them
and a kernel's block of channels up to 128, a tile of a product 64; a chunk is about 16 output rows
in the depthwise kernels and up to 128 pixels in the reductions. Cases named b0_... and b7_... are
all the distinct block shapes of those networks at their own resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from shapes import shapes_of

BATCH_PIXELS = 2000  # images of a network's case: as many as have about this many pixels, at most 2


@dataclass(frozen=True)
class DwconvCase:
    """x [n,c,h,w], weight [c,1,k,k]; padding as the op takes it."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    stride: int = 1
    padding: int | tuple[int, int, int, int] | None = None

    @property
    def values_per_channel(self) -> int:
        """Values that BatchNorm averages over in training."""
        pad = (self.k - 1) // 2 if self.padding is None else self.padding
        left, right, top, bottom = (pad,) * 4 if isinstance(pad, int) else pad
        rows = (self.h + top + bottom - self.k) // self.stride + 1
        columns = (self.w + left + right - self.k) // self.stride + 1
        return self.n * rows * columns


@dataclass(frozen=True)
class SqueezeExciteCase:
    """x [n,c,h,w], r hidden channels."""

    name: str
    n: int
    c: int
    h: int
    w: int
    r: int


@dataclass(frozen=True)
class PointwiseCase:
    """x [n,c,h,w] to [n,out,h,w]."""

    name: str
    n: int
    c: int
    out: int
    h: int
    w: int
    act: str | None = "silu"
    gate: bool = False
    residual: bool = False


_DWCONV = (
    DwconvCase("c_eq_vector", 2, 16, 8, 8, 3),
    DwconvCase("c_lt_vector", 3, 3, 9, 9, 3),
    DwconvCase("c_odd", 2, 37, 10, 10, 5),
    DwconvCase("c_one", 3, 1, 7, 6, 3),
    DwconvCase("c_gt_block", 2, 145, 6, 5, 3),
    DwconvCase("c_gt_block_stride_2", 2, 264, 7, 7, 5, 2),
    DwconvCase("7x9", 2, 24, 7, 9, 3),
    DwconvCase("7x9_stride_2", 2, 24, 7, 9, 5, 2),
    DwconvCase("8x10_stride_2", 2, 24, 8, 10, 3, 2),
    DwconvCase("h_lt_kernel", 3, 20, 2, 11, 5),
    DwconvCase("w_lt_kernel", 3, 20, 11, 3, 5, 2),
    DwconvCase("one_pixel", 24, 40, 1, 1, 3),
    DwconvCase("one_row", 2, 17, 1, 40, 3),
    DwconvCase("one_column_stride_2", 2, 17, 40, 1, 3, 2),
    DwconvCase("h_gt_chunk", 1, 19, 37, 6, 3),
    DwconvCase("h_gt_chunk_k5_stride_2", 1, 19, 70, 6, 5, 2),
    DwconvCase("w_gt_strip", 1, 128, 5, 70, 5),
    DwconvCase("w_gt_strip_stride_2", 1, 128, 6, 143, 3, 2),
    DwconvCase("batch_gt_groups", 17, 6, 5, 6, 3),
    DwconvCase("batch_0", 0, 20, 8, 8, 3),
    DwconvCase("batch_0_stride_2", 0, 20, 8, 8, 5, 2),
    DwconvCase("same_k3_stride_2", 2, 18, 8, 12, 3, 2, (0, 1, 0, 1)),
    DwconvCase("same_k5_stride_2", 2, 18, 12, 8, 5, 2, (1, 2, 1, 2)),
    DwconvCase("four_sides", 2, 21, 9, 8, 3, 1, (0, 3, 2, 1)),
    DwconvCase("four_sides_k5_stride_2", 2, 21, 9, 8, 5, 2, (3, 0, 1, 4)),
    DwconvCase("padding_gt_kernel", 2, 21, 4, 5, 3, 2, (5, 4, 6, 7)),
    DwconvCase("no_padding", 2, 21, 9, 8, 3, 1, 0),
    DwconvCase("no_padding_one_output", 24, 21, 5, 5, 5, 1, 0),
    DwconvCase("unread_border_stride_2", 2, 21, 8, 8, 3, 2, 0),
    DwconvCase("int_padding", 2, 21, 7, 8, 3, 1, 2),
    DwconvCase("k1", 2, 21, 9, 8, 1),
    DwconvCase("k1_stride_2", 2, 21, 9, 8, 1, 2),
    DwconvCase("k7", 2, 21, 9, 8, 7),
    DwconvCase("k7_stride_2", 2, 21, 18, 11, 7, 2),
    DwconvCase("k9", 2, 21, 5, 12, 9),
    DwconvCase("k9_stride_2_four_sides", 2, 21, 20, 12, 9, 2, (3, 5, 8, 0)),
)

_SQUEEZE_EXCITE = (
    SqueezeExciteCase("c_eq_vector", 2, 16, 6, 6, 4),
    SqueezeExciteCase("c_lt_vector", 2, 3, 6, 6, 1),
    SqueezeExciteCase("c_odd", 3, 37, 7, 9, 9),
    SqueezeExciteCase("c_one", 4, 1, 5, 5, 1),
    SqueezeExciteCase("r_odd", 2, 40, 5, 6, 19),
    SqueezeExciteCase("r_gt_c", 2, 12, 5, 6, 33),
    SqueezeExciteCase("one_pixel", 5, 24, 1, 1, 6),
    SqueezeExciteCase("hw_eq_chunk", 2, 20, 16, 32, 5),
    SqueezeExciteCase("hw_gt_chunk", 2, 20, 23, 23, 5),
    SqueezeExciteCase("layers_in_parallel", 3, 300, 3, 3, 40),
    SqueezeExciteCase("batch_0", 0, 20, 6, 6, 5),
)

_POINTWISE = (
    PointwiseCase("c_eq_vector", 2, 16, 32, 6, 6),
    PointwiseCase("c_odd", 3, 37, 21, 7, 9),
    PointwiseCase("out_odd", 2, 16, 20, 5, 4),
    PointwiseCase("c_one", 3, 1, 19, 5, 7),
    PointwiseCase("out_one", 3, 19, 1, 5, 7),
    PointwiseCase("no_act", 2, 24, 40, 7, 7, act=None),
    PointwiseCase("gate", 2, 24, 40, 7, 7, gate=True),
    PointwiseCase("gate_out_gt_pixels", 3, 24, 40, 3, 5, gate=True),
    PointwiseCase("residual", 2, 32, 24, 7, 7, residual=True),
    PointwiseCase("residual_no_act", 2, 40, 24, 7, 7, act=None, residual=True),
    PointwiseCase("gate_residual_no_act", 2, 40, 24, 7, 7, act=None, gate=True, residual=True),
    PointwiseCase("one_pixel", 16, 40, 24, 1, 1, gate=True, residual=True),
    PointwiseCase("batch_0", 0, 40, 24, 7, 7, gate=True, residual=True),
)


# The head: pixels are averaged. A part of an image's pixels in the products has about 448.
_HEAD = (
    PointwiseCase("c_eq_vector", 2, 16, 32, 7, 7),
    PointwiseCase("c_odd", 3, 37, 21, 9, 5),
    PointwiseCase("one_image", 1, 19, 35, 7, 7),
    PointwiseCase("one_pixel", 16, 40, 24, 1, 1),
    PointwiseCase("out_gt_tile", 8, 24, 70, 3, 4),
    PointwiseCase("hw_gt_part", 2, 20, 33, 24, 20),
    PointwiseCase("batch_0", 0, 40, 24, 7, 7),
)


@dataclass(frozen=True)
class StemCase:
    """x [n,c,h,w] to [n,out,Ho,Wo], kernel kxk; padding is (left, right, top, bottom)."""

    name: str
    n: int
    c: int
    out: int
    h: int
    w: int
    k: int = 3
    stride: int = 2
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)


_STEM = (
    StemCase("c_eq_vector", 2, 3, 16, 10, 10),
    StemCase("out_odd", 2, 4, 21, 9, 7),
    StemCase("c_one", 3, 1, 8, 9, 7),
    StemCase("k5_stride_1", 2, 3, 8, 9, 7, 5, 1, (2, 2, 2, 2)),
    StemCase("oblong_padding", 2, 3, 8, 9, 7, 3, 2, (2, 2, 0, 0)),
    StemCase("same_even", 2, 3, 8, 10, 8, 3, 2, (0, 1, 0, 1)),
    StemCase("same_odd_rows", 2, 3, 8, 9, 8, 3, 2, (0, 1, 1, 1)),
    StemCase("same_k5", 2, 3, 24, 11, 12, 5, 2, (2, 2, 1, 2)),
    StemCase("k1", 2, 3, 20, 9, 7, 1, 2, (0, 0, 0, 0)),
    StemCase("k7_out_gt_group", 2, 3, 40, 12, 15, 7, 2, (3, 3, 3, 3)),
    StemCase("stride_3_four_sides", 2, 3, 8, 14, 11, 3, 3, (3, 0, 1, 4)),
    StemCase("unread_border", 2, 3, 8, 8, 8, 3, 2, (0, 0, 0, 0)),
    StemCase("c_gt_chain", 2, 50, 33, 6, 5),
    StemCase("w_gt_chain", 2, 3, 12, 5, 270),
    StemCase("h_gt_chunk", 3, 3, 12, 70, 6),
    StemCase("one_pixel", 16, 3, 8, 1, 1),
    StemCase("batch_0", 0, 3, 8, 9, 7),
    StemCase("b0", 1, 3, 32, 224, 224),
)


@dataclass(frozen=True)
class MBConvCase:
    """x [n,c,h,w] to [n,out,Ho,Wo] with `expanded` channels between and r in squeeze-and-excite."""

    name: str
    n: int
    c: int
    expanded: int
    out: int
    h: int
    w: int
    k: int
    stride: int
    r: int
    residual: bool


_MBCONV = (
    MBConvCase("c_eq_vector", 2, 16, 64, 16, 7, 7, 3, 1, 4, True),
    MBConvCase("c_odd_stride_2", 3, 11, 37, 21, 9, 8, 5, 2, 3, False),
    MBConvCase("c_odd_k3_stride_2", 2, 13, 37, 21, 5, 4, 3, 2, 19, False),
    MBConvCase("c_odd_k3_residual", 2, 13, 37, 13, 5, 4, 3, 1, 19, True),
    MBConvCase("no_expansion", 2, 24, 24, 12, 7, 9, 3, 1, 6, False),
    MBConvCase("no_expansion_residual", 2, 24, 24, 24, 7, 9, 3, 1, 6, True),
    MBConvCase("one_pixel", 16, 8, 48, 8, 1, 1, 3, 1, 2, True),
    MBConvCase("k7", 2, 8, 48, 12, 10, 9, 7, 1, 6, False),
    MBConvCase("c_gt_tile", 2, 72, 160, 72, 7, 7, 3, 1, 6, True),
    MBConvCase("batch_0", 0, 16, 64, 16, 7, 7, 3, 1, 4, True),
    MBConvCase("w_gt_tile_stride_2", 3, 20, 36, 24, 9, 19, 3, 2, 5, False),
    MBConvCase("w_gt_tile_k5", 2, 24, 32, 24, 5, 15, 5, 1, 6, True),
)


def _batch(size: int) -> int:
    return max(1, min(2, BATCH_PIXELS // size**2))


def dwconv_of(variant: str, batch: int | None = None) -> Iterator[DwconvCase]:
    for b in shapes_of(variant).blocks:
        c, name = b.channels[1], f"{variant}_c{b.channels[1]}_{b.size}_k{b.kernel}_s{b.stride}"
        yield DwconvCase(name, batch or _batch(b.out_size), c, b.size, b.size, b.kernel, b.stride)


def squeeze_excite_of(variant: str, batch: int | None = None) -> Iterator[SqueezeExciteCase]:
    for b in shapes_of(variant).blocks:
        c, size = b.channels[1], b.out_size
        name = f"{variant}_c{c}_{size}_r{b.squeezed}"
        yield SqueezeExciteCase(name, batch or _batch(size), c, size, size, b.squeezed)


def pointwise_of(variant: str, batch: int | None = None) -> Iterator[PointwiseCase]:
    for b in shapes_of(variant).blocks:
        c, expanded, out = b.channels
        if b.expands:
            yield PointwiseCase(
                f"{variant}_expand_c{c}_{expanded}_{b.size}",
                *(batch or _batch(b.size), c, expanded, b.size, b.size),
            )
        yield PointwiseCase(
            f"{variant}_project_c{expanded}_{out}_{b.out_size}{'_residual' * b.residual}",
            *(batch or _batch(b.out_size), expanded, out, b.out_size, b.out_size),
            act=None, gate=True, residual=b.residual,
        )  # fmt: skip


def head_of(variant: str, batch: int = 2) -> Iterator[PointwiseCase]:
    head = shapes_of(variant).head
    sizes = (batch, head.channels, head.out_channels, head.size, head.size)
    yield PointwiseCase(f"{variant}_head", *sizes)


def stem_of(variant: str, batch: int = 1) -> StemCase:
    s = shapes_of(variant).stem
    pad = (s.kernel - 1) // 2
    return StemCase(
        f"{variant}_stem", batch, s.channels, s.out_channels, s.size, s.size, s.kernel, s.stride,
        (pad,) * 4,
    )  # fmt: skip


def mbconv_of(variant: str, batch: int | None = None) -> Iterator[MBConvCase]:
    for b in shapes_of(variant).blocks:
        c, expanded, out = b.channels
        name = f"{variant}_c{c}_{out}_{b.size}_k{b.kernel}_s{b.stride}"
        sizes = (
            batch or _batch(b.size),
            c,
            expanded,
            out,
            b.size,
            b.size,
            b.kernel,
            b.stride,
            b.squeezed,
        )
        yield MBConvCase(name, *sizes, b.residual)


def _params(*groups: Iterable[Any]) -> list[Any]:
    """The distinct cases of all groups as pytest's parameters."""
    cases = dict.fromkeys(case for group in groups for case in group)
    return [pytest.param(case, id=case.name) for case in cases]


DWCONV_CASES = _params(_DWCONV, dwconv_of("b0"))
SQUEEZE_EXCITE_CASES = _params(_SQUEEZE_EXCITE, squeeze_excite_of("b0"))
POINTWISE_CASES = _params(_POINTWISE, pointwise_of("b0"))
HEAD_CASES = _params(_HEAD, head_of("b0"))
STEM_CASES = _params(_STEM)
MBCONV_CASES = _params(_MBCONV, mbconv_of("b0"))
# A float64 reference of one of these takes about a second: compare them in a few modes only.
LARGE_DWCONV_CASES = _params(dwconv_of("b7"))
LARGE_SQUEEZE_EXCITE_CASES = _params(squeeze_excite_of("b7"))
LARGE_POINTWISE_CASES = _params(pointwise_of("b7"))
LARGE_HEAD_CASES = _params(head_of("b7"))
LARGE_MBCONV_CASES = _params(mbconv_of("b7"))
LARGE_STEM_CASES = _params([StemCase("b7", 1, 3, 64, 600, 600)])


def find_param(params: Iterable[Any], name: str) -> Any:
    """The parameter of that name in one of the lists above."""
    return next(param for param in params if param.id == name)


def find(params: Iterable[Any], name: str) -> Any:
    """The case of that name in one of the lists above."""
    return find_param(params, name).values[0]
