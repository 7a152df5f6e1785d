"""Whatever eval mode keeps between calls follows every change, and never enters the state."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import networks
from edits import EDITS, one_training_step
from effnet_fast.models import EfficientNet
from networks import TINY, Pair, pair, random_images, trio
from tolerances import assert_no_worse_than

X = random_images(2, 48)


def check(models: Pair) -> Tensor:
    with torch.no_grad():
        return models.assert_alike(X, backward=False)["y"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_edit_is_followed(name: str) -> None:
    models = pair()
    before = check(models)
    for _ in range(2):
        after = check(models.apply(EDITS[name]))
        assert networks.rms(after - before) > 3 * networks.ALIKE * networks.rms(before)
        before = after


def test_edit_in_inference_mode_is_followed() -> None:
    models = pair()
    with torch.inference_mode():
        check(models)
        models.apply(EDITS["project_weight"])
        check(models)
    check(models)


def test_network_made_in_inference_mode() -> None:
    """Its tensors keep no version counter."""
    with torch.inference_mode():
        models = pair()
        before = check(models)
        after = check(models.apply(EDITS["expand_weight"]))
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)


def test_state_dict_and_buffers_stay_torchvisions() -> None:
    models = pair()
    check(models)
    models.apply(one_training_step)
    check(models)
    assert list(models.actual.state_dict()) == list(models.stock.state_dict())
    buffers = [name for name, _ in models.actual.named_buffers()]
    assert buffers == [name for name, _ in models.stock.named_buffers()]
    assert [n for n, _ in models.actual.named_modules()] == [
        n for n, _ in models.stock.named_modules()
    ]


def test_pickle_does_not_grow_with_use() -> None:
    def size(model: nn.Module) -> int:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.tell()

    model = EfficientNet(TINY).eval()
    unused = size(model)
    with torch.no_grad():
        model(X)
    assert size(model) < 1.1 * unused


@pytest.mark.slow
def test_copies_go_their_own_way() -> None:
    models = pair()
    before = check(models)
    twins = copy.deepcopy(models)
    check(twins.apply(EDITS["load_state_dict"]))
    assert torch.equal(check(models), before)

    state_of_copy = copy.deepcopy(models.actual)
    with torch.no_grad():
        assert torch.equal(state_of_copy(X), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_moves_are_followed(dtype: torch.dtype) -> None:
    models = pair()
    check(models)
    models.actual.to(dtype)
    models.stock.to(dtype)
    with torch.no_grad():
        y, expected = (model(X.to(dtype)) for model in models.models)
        assert y.dtype is dtype
        tolerance = 0.1 if dtype is torch.bfloat16 else 1e-9
        assert networks.rms(y - expected) <= tolerance * networks.rms(expected)
        models.actual.float()
        models.stock.float()
        torch.testing.assert_close(models.actual(X), models.stock(X), rtol=1e-3, atol=1e-3)


def test_layout_moves_are_followed() -> None:
    models = pair()
    before = check(models)
    models.actual.to(memory_format=torch.channels_last)
    after = check(models)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_half_precision_under_autocast() -> None:
    """Judged by the exact result: stock itself errs by a tenth of the logits here."""
    models = trio()
    with torch.no_grad():
        exact = models.exact(X.double())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                y, stock = models.actual(X), models.stock(X)
            assert_no_worse_than(y, stock, exact)
