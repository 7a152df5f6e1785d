"""The model that chooses between one kernel and two for expansion and depthwise convolution."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import builds, record, run_inference
from effnet_fast.triton_kernels import expand_choice, launching, mbconv
from effnet_fast.triton_kernels.expand_choice import Cost, Shape, Tile, tile_of
from shapes import BlockShape, shapes_of

BF16 = torch.empty(0, dtype=torch.bfloat16, device="meta")
FUSED = "expand_dwconv_fwd_kernel"


def shape_of(block: BlockShape, batch: int, element_size: int = 2) -> Shape:
    c, e, _ = block.channels
    sizes = (block.size, block.size, block.out_size, block.out_size)
    return Shape(batch, c, e, *sizes, block.kernel, block.stride, element_size)


def blocks(*variants: str) -> list[BlockShape]:
    found = (b for v in variants for b in shapes_of(v).blocks if b.expands)
    return list(dict.fromkeys(found))


def cost_of(shape: Shape) -> Cost | None:
    return expand_choice.fused(shape, tile_of(BF16, shape)[1])


@pytest.mark.parametrize("batch", [1, 64])
def test_the_expanded_tensor_is_what_is_saved(batch: int) -> None:
    for block in blocks("b0", "b4", "b7"):
        shape = shape_of(block, batch)
        two, one = expand_choice.separate(shape), cost_of(shape)
        if one is not None:
            assert two.bytes - one.bytes == 2 * 2 * batch * block.channels[1] * block.size**2
            assert one.silus >= two.silus, "the halo is formed again, never less"
            assert one.flops >= two.flops


def test_no_time_is_below_that_of_its_bytes() -> None:
    for block in blocks("b0", "b4", "b7"):
        shape = shape_of(block, 64)
        for cost in (expand_choice.separate(shape), cost_of(shape)):
            if cost is not None:
                assert cost.seconds > cost.bytes / expand_choice.BANDWIDTH


def test_the_largest_expanded_tensors_are_left_out() -> None:
    first = next(b for b in shapes_of("b0").blocks if b.expands)
    shape = shape_of(first, 64)
    assert expand_choice.is_joined_quicker(shape, tile_of(BF16, shape)[1])


def test_what_is_refused() -> None:
    block = blocks("b0")[0]
    for shape, text in (
        (shape_of(block, 64, 4), "fp32"),
        (shape_of(block, 64)._replace(in_channels=136), "128 input channels"),
        (shape_of(block, 64)._replace(kernel=7), "kernel 7"),
    ):
        assert text in (expand_choice.refusal(shape) or "")
        tile = Tile(32, 32, 2)
        assert not expand_choice.is_joined_quicker(shape, tile)
        assert expand_choice.fused(shape, tile) is None


def test_strips_cover_the_output() -> None:
    for block in blocks("b0", "b7"):
        shape = shape_of(block, 1)
        tile = tile_of(BF16, shape)[1]
        for run in expand_choice.RUNS:
            strips, columns, channel_tiles = expand_choice.grid(shape, tile, run)
            wide = (tile.pixels - block.kernel) // block.stride + 1
            assert (strips - 1) * run < block.out_size <= strips * run
            assert (columns - 1) * wide < block.out_size <= columns * wide
            assert (channel_tiles - 1) * tile.channels < shape.channels
            assert channel_tiles * tile.channels >= shape.channels


@pytest.mark.parametrize("way", [True, False])
def test_a_launch_follows_the_choice(way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What mbconv_eval starts, the keyword left out."""
    original = mbconv.mbconv_eval
    monkeypatch.setattr(expand_choice, "is_joined_quicker", lambda shape, tile: way)
    monkeypatch.setattr(mbconv, "mbconv_eval", lambda *a, fused: original(*a))
    started = record(lambda: run_inference(blocks("b0")[0], 2, torch.bfloat16))
    assert (FUSED in {build.name for build in started}) == way


def test_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float32, allowed are torch.float16"):
        _forced(torch.float32)
    assert not launching.INTERPRETS


def _forced(dtype: torch.dtype) -> None:
    original = mbconv.mbconv_eval
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mbconv, "mbconv_eval", lambda *a, fused: original(*a, fused=True))
        record(lambda: run_inference(blocks("b0")[0], 2, dtype))


def test_the_fused_kernel_is_launched_by_networks() -> None:
    """Its configurations are among those that are compiled ahead of time."""
    kernels = {build.name for build in builds(torch.bfloat16)}
    assert FUSED in kernels
