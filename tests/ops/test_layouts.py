"""Strided, sliced and expanded tensors: taken as they are, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tiers
from effnet_fast import ops
from parity import (
    BACKENDS,
    BF16,
    FP32,
    SAMPLES,
    Call,
    Dtypes,
    assert_parity,
    assert_same,
    channels_last,
    nchw_copy,
    random_like,
    run,
    runs,
    sample,
    with_gradients,
)

ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ANY_RUN = runs((FP32, BF16), tiers.INSTRUCTION_SETS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
ANY_SAMPLE = pytest.mark.parametrize("name", SAMPLES)
DIFFERENTIABLE = pytest.mark.parametrize("name", [n for n in SAMPLES if n != "pointwise_eval"])
IMAGES = pytest.mark.parametrize("name", SAMPLES[:5])  # differentiable, with an image as output


def _inside(x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """x as a slice of a larger channels_last tensor, NaN around it."""
    shape = [b + size + a for b, size, a in zip(before, x.shape, after, strict=True)]
    large = channels_last(torch.full(shape, float("nan"), dtype=x.dtype))
    view = large[tuple(slice(b, b + size) for b, size in zip(before, x.shape, strict=True))]
    return view.copy_(x)


def _stepped(x: Tensor, *steps: int) -> Tensor:
    """x as every n-th element of a larger channels_last tensor along each dimension."""
    shape = [size * step for size, step in zip(x.shape, steps, strict=True)]
    large = channels_last(torch.full(shape, float("nan"), dtype=x.dtype))
    return large[tuple(slice(None, None, step) for step in steps)].copy_(x)


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "channel_slice": lambda x: _inside(x, (0, 5, 0, 0), (0, 3, 0, 0)),
    "pixel_slice": lambda x: _inside(x, (0, 0, 1, 2), (0, 0, 3, 0)),
    "slice_of_all": lambda x: _inside(x, (1, 1, 1, 1), (1, 0, 2, 3)),
    "every_second_image": lambda x: _stepped(x, 2, 1, 1, 1),
    "every_second_pixel": lambda x: _stepped(x, 1, 1, 2, 3),
    "h_inside_w": lambda x: channels_last(x.transpose(2, 3)).transpose(2, 3),
    "n_inside_hw": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "one_image_expanded": lambda x: x[:1].expand_as(x),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "every_second_channel": lambda x: _stepped(x, 1, 2, 1, 1),
    "one_channel_expanded": lambda x: x[:, :1].expand_as(x),
    "one_row_expanded": lambda x: x[:, :, :1].expand_as(x),
    "one_pixel_expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@ANY_RUN
@pytest.mark.parametrize("layout", TAKEN)
@ANY_SAMPLE
def test_input_strides_that_are_taken(name: str, layout: str, dtypes: Dtypes, backend: str) -> None:
    call = sample(name, dtypes)
    call = call.with_tensors(x=TAKEN[layout](call.x))
    dense = call.with_tensors(x=channels_last(call.x))
    assert call.x.stride() != dense.x.stride()
    wanted = with_gradients(call)
    actual = run(call, backend, wanted=wanted)
    assert_same(actual, run(dense, backend, wanted=wanted))
    stock = run(dense, wanted=wanted)
    if name.startswith("stem"):  # it takes images as they are, which decides about its gradients
        as_given = run(call, wanted=wanted)
        stock |= {name: as_given[name] for name in as_given if name.startswith("grad ")}
    assert_parity(actual, stock, run(dense, double=True, wanted=wanted), dtypes.x)


@ANY_DTYPE
@pytest.mark.parametrize("layout", REFUSED)
@ANY_SAMPLE
def test_input_strides_that_are_refused(name: str, layout: str, dtypes: Dtypes) -> None:
    call = sample(name, dtypes)
    call = call.with_tensors(x=REFUSED[layout](call.x))
    wanted = with_gradients(call)
    if name.startswith("stem"):  # an image may come as it is
        dense = call.with_tensors(x=channels_last(call.x))
        assert_same(run(call, "cpu", wanted=wanted), run(dense, "cpu", wanted=wanted))
        return
    hint = r"strides .*channels_last: x\.contiguous\(memory_format=torch\.channels_last\)"
    with pytest.raises(RuntimeError, match=rf"'cpu' cannot run {call.op}: x has {hint}"):
        run(call, "cpu", wanted=wanted)
    assert_same(run(call, "auto", wanted=wanted), run(call, wanted=wanted))


@pytest.mark.parametrize("sizes", [(2, 1, 5, 4), (2, 6, 1, 1), (1, 1, 1, 6)], ids=str)
def test_layouts_that_sizes_of_1_leave_open(sizes: tuple[int, ...]) -> None:
    """NCHW is channels_last, too, where C or H * W is 1."""
    x = torch.randn(sizes)
    call = Call(
        "squeeze_excite",
        {
            "x": x,
            "reduce_weight": torch.randn(3, sizes[1]),
            "reduce_bias": torch.randn(3),
            "expand_weight": torch.randn(sizes[1], 3),
            "expand_bias": torch.randn(sizes[1]),
        },
    )
    assert_same(run(call, "cpu"), run(call.with_tensors(x=channels_last(x)), "cpu"))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_scalar": lambda g: g.new_ones(()).expand_as(g),
    "expanded_over_pixels": lambda g: g[:, :, :1, :1].expand_as(g),
    "nchw": lambda g: g.contiguous(),
    **TAKEN,
    "every_second_channel": REFUSED["every_second_channel"],
}


@ANY_RUN
@pytest.mark.parametrize("layout", GRADIENTS)
@IMAGES
def test_strides_of_grad_y(name: str, layout: str, dtypes: Dtypes, backend: str) -> None:
    call = sample(name, dtypes)
    grad_y = GRADIENTS[layout](random_like(run(call, backend, wanted=())["y"]))
    dense = run(call, backend, grad_y=channels_last(grad_y))
    assert_same(run(call, backend, grad_y=grad_y), dense)


@ANY_RUN
@DIFFERENTIABLE
def test_saved_tensors_that_come_back_in_another_layout(
    name: str, dtypes: Dtypes, backend: str
) -> None:
    """As hooks that offload them may give them back: NCHW without gaps."""
    call = sample(name, dtypes)
    with torch.autograd.graph.saved_tensors_hooks(nchw_copy, lambda saved: saved):
        actual = run(call, backend)
    assert_same(actual, run(call, backend))


@ANY_BACKEND
@DIFFERENTIABLE
def test_sum_backward(name: str, backend: str) -> None:
    """Accumulates into .grad as stock does, from a gradient that is one expanded number."""
    call = sample(name)
    tensors = {k: v.clone() for k, v in call.tensors.items()}
    leaves = [tensors[k].requires_grad_() for k in call.differentiable]
    function = getattr(ops, call.op)
    for _ in range(2):
        function(**tensors, **call.options, backend=backend).sum().backward()
    once = run(call, backend, grad_y=GRADIENTS["expanded_scalar"](run(call, backend)["y"]))
    for k, leaf in zip(call.differentiable, leaves, strict=True):
        assert leaf.grad.stride() == leaf.stride()
        assert torch.equal(leaf.grad, 2 * once[f"grad {k}"])


@ANY_RUN
@ANY_SAMPLE
def test_strides_of_parameters(name: str, dtypes: Dtypes, backend: str) -> None:
    """Weights and vectors as slices of something larger, in any order of dimensions."""
    call = sample(name, dtypes)
    views = {}
    for argument, tensor in call.tensors.items():
        if argument in ("x", "residual"):
            continue
        reverse = tuple(range(tensor.dim()))[::-1]
        large = tensor.permute(reverse).contiguous().permute(reverse).repeat_interleave(2, 0)
        views[argument] = large[::2]
        assert torch.equal(views[argument], tensor)
    wanted = with_gradients(call)
    assert_same(
        run(call.with_tensors(**views), backend, wanted=wanted), run(call, backend, wanted=wanted)
    )


@ANY_DTYPE
@ANY_SAMPLE
def test_nothing_given_is_written_or_returned(name: str, dtypes: Dtypes) -> None:
    call = sample(name, dtypes)
    before = {k: v.clone() for k, v in call.tensors.items()}
    versions = {k: v._version for k, v in call.tensors.items()}
    results = run(call, "cpu", wanted=with_gradients(call))
    storages = {v.untyped_storage().data_ptr() for v in call.tensors.values()}
    for result in results.values():
        assert result.untyped_storage().data_ptr() not in storages
    for k, v in call.tensors.items():
        assert torch.equal(v, before[k])
        assert v._version == versions[k]
