"""Whatever eval mode keeps between calls follows every change, and never enters the state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks
from edits import BYTES, EDITS, from_another_process, one_training_step
from effnet_fast.inference.snapshot import Snapshot
from effnet_fast.models import EfficientNet
from effnet_fast.modules.structure import RefusedError
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


@pytest.mark.parametrize(
    "made_by", [torch.no_grad, torch.inference_mode], ids=["usual", "inference"]
)
def test_edited_bytes_are_followed(made_by: Callable[[], AbstractContextManager[Any]]) -> None:
    """The next forward is of the weights as they are in memory, whatever wrote them."""
    with made_by():
        models = pair()
        before = check(models)
        for name, edit in BYTES.items():
            after = check(models.apply(edit))
            changed = networks.rms(after - before) > 3 * networks.ALIKE * networks.rms(before)
            assert changed, f"{name} changes too little to be seen"
            before = after


def test_edits_by_another_process_are_followed() -> None:
    models = pair()
    for model in models.models:
        model.share_memory()
    before = check(models)
    assert not torch.equal(check(models.apply(from_another_process)), before)


def test_tied_and_overlapping_weights() -> None:
    """The stem's bias-free norm shares memory with another's; a weight is a view with gaps."""
    models = pair()
    for model in models.models:
        one, other = (model.features[4][i].block[3][1] for i in (0, 1))
        other.weight = one.weight
        memory = torch.zeros(2, 2 * one.bias.numel())
        for row, bn in zip(memory, (one, other), strict=True):
            bn.bias = nn.Parameter(row[::2])
        model.memory_of_biases = [memory]
    before = check(models)
    for edit in (
        lambda m: m.features[4][1].block[3][1].weight.data[3:5].mul_(4.0),
        lambda m: m.memory_of_biases[0][1, 8:12].fill_(2.0),
    ):
        after = check(models.apply(edit))
        assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
        before = after


def test_numeric_gradient() -> None:
    """By single entries of a weight, each written twice between two forwards."""
    model = pair().actual
    weight = model.classifier[1].weight
    (exact,) = torch.autograd.grad(model(X)[:, 3].sum(), weight)
    with torch.no_grad():
        for column in (5, 77):
            sums = []
            for step in (0.5, -1.0):
                weight.data[3, column] += step
                sums.append(model(X)[:, 3].sum())
            weight.data[3, column] += 0.5
            numeric = float(sums[0] - sums[1])
            assert abs(numeric - float(exact[3, column])) < 1e-2 * abs(numeric)


def test_freed_memory_is_not_read() -> None:
    model = pair().actual
    with torch.no_grad():
        model(X)
        model.classifier[1].weight.untyped_storage().resize_(0)
        snapshot = model._own_plan.snapshot
        assert not snapshot.is_fresh(model)
        with pytest.raises(RefusedError, match="no memory"):
            Snapshot(model, every_byte=True)


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
