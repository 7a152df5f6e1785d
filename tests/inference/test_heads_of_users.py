"""Heads of any kind behind packed weights: what they give is handed on as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast import use_backend
from effnet_fast.models import EfficientNet
from networks import pair, random_images

X = random_images(2, 48)


class Several(nn.Module):
    """A head that gives whatever a function makes of features."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


HEADS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, x.sum(1)),
    "dict": lambda x: {"features": x},
    "integers": lambda x: x.argmax(1),
    "float64": lambda x: x.double(),
    "softmax": lambda x: x.softmax(1),  # fp32 under autocast
}


def flat(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y.values() if isinstance(y, dict) else y)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", HEADS)
def test_a_plain_model_gives_what_stock_gives(name: str, autocast: bool) -> None:
    model = pair().actual
    assert isinstance(model, EfficientNet)
    model.classifier = Several(HEADS[name])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = model(X)
        with use_backend("reference"):
            expected = model(X)
    assert type(actual) is type(expected)
    for a, b in zip(flat(actual), flat(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


@pytest.mark.parametrize("name", HEADS)
def test_deploy_casts_numbers_that_float(name: str) -> None:
    model = pair().actual
    model.classifier = Several(HEADS[name])
    found = flat(effnet_fast.deploy(model)(X.bfloat16()))
    if name in ("tuple", "dict"):
        assert all(y.dtype is torch.float32 for y in found)  # as the head gave them
    else:
        assert found[0].dtype is (torch.int64 if name == "integers" else torch.bfloat16)


def test_images_too_small_are_pytorchs_error() -> None:
    model = pair().actual
    model.features[0][0] = nn.Conv2d(3, model.features[0][0].out_channels, 3, 2, bias=False)
    model.eval()
    for backend in ("auto", "reference"):
        with torch.no_grad(), use_backend(backend):
            assert model(X).isfinite().all()
            with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
                model(X[:, :, :2, :2])


def test_an_inference_tensor_put_in_place_is_noticed() -> None:
    """It keeps no version counter, which the check must not ask for."""
    model = pair().actual
    with torch.no_grad():
        model(X)
        model(X)
    weight = model.classifier[1].weight
    with torch.inference_mode():
        other = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    torch.utils.swap_tensors(weight, other)
    with torch.no_grad():
        actual = model(X)
        with use_backend("reference"):
            torch.testing.assert_close(actual, model(X))
