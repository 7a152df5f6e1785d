"""Which layout PyTorch takes a tensor for, and conversions with their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops.layout import is_nhwc, to_nchw, to_nhwc

SIZES = list(itertools.product((1, 2), (1, 3), (1, 4), (1, 5)))
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "channels_last_transposed": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "from_hwc": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded_channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expanded_channels_last": lambda x: to_nhwc(x)[:1].expand(3, -1, -1, -1),
    "sliced_channels": lambda x: torch.cat((x, x), 1)[:, 1 : 1 + x.shape[1]],
    "sliced_channels_last": lambda x: to_nhwc(torch.cat((x, x), 1))[:, : x.shape[1]],
    "sliced_rows": lambda x: to_nhwc(torch.cat((x, x), 2))[:, :, 1 : 1 + x.shape[2]],
    "overlapping": lambda x: torch.randn(999).as_strided(x.shape, (7, 1, 7, 7)),
}


def pytorch_takes_it_for_nhwc(x: Tensor) -> bool | None:
    """What a layer of PyTorch decides, which hands the layout on: told from its result.

    None where both layouts have the same strides.
    """
    y = F.max_pool2d(x, 1)
    formats = torch.channels_last, torch.contiguous_format
    last, first = (y.clone(memory_format=each).stride() for each in formats)
    return None if last == first else y.stride() == last


@pytest.mark.parametrize("view", VIEWS)
def test_as_pytorch_sees_it(view: str) -> None:
    answers = set()
    for size in SIZES:
        x = VIEWS[view](torch.randn(size))
        answer = pytorch_takes_it_for_nhwc(x)
        assert answer in (None, is_nhwc(x)), (size, x.stride())
        answers.add(answer)
    assert not is_nhwc(VIEWS[view](torch.randn(2, 3, 4, 5))[:0])
    only = {"contiguous": False, "channels_last": True}
    assert answers == {None, only[view]} if view in only else answers != {None}


def test_there_and_back() -> None:
    for size in SIZES:
        x = torch.randn(size)
        there = to_nhwc(x)
        if there.stride() == x.stride():  # one number in each image
            continue
        assert is_nhwc(there), size
        assert torch.equal(there, x)
        assert to_nhwc(there) is there
        back = to_nchw(there)
        assert back.stride() == x.stride(), size
        assert to_nchw(back) is back
        assert torch.equal(back, x)


@pytest.mark.parametrize("convert", [to_nhwc, to_nchw])
def test_gradients_turn_back(convert: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    x = (x if convert is to_nhwc else to_nhwc(x)).requires_grad_()
    given = is_nhwc(x)
    for arriving in (to_nhwc(torch.randn(2, 3, 2, 4).double()), torch.randn(2, 3, 2, 4).double()):
        y = convert(x)
        assert is_nhwc(y) != given
        (grad,) = torch.autograd.grad(y, x, arriving, create_graph=True)
        assert is_nhwc(grad) == given
        (grad,) = torch.autograd.grad(convert(x).pow(3), x, arriving, create_graph=True)
        (again,) = torch.autograd.grad(grad, x, to_nchw(arriving) if given else to_nhwc(arriving))
        assert is_nhwc(grad) == is_nhwc(again) == given
    assert torch.autograd.gradcheck(convert, (x,))
    assert torch.autograd.gradgradcheck(convert, (x,))
