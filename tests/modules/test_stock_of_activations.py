"""Code that is replaced below an activation or a gate is run, wherever stock's forward meets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from effnet_fast import use_backend
from effnet_fast.modules.explain import explain
from replacing import X, count, network, replace_method

# Of each activation and gate the code that its module's forward runs.
BELOW: dict[type[nn.Module], tuple[tuple[Any, str], ...]] = {
    nn.ReLU: ((nn.ReLU, "forward"), (nn.ReLU, "__call__"), (F, "relu"), (torch, "relu_")),
    nn.ReLU6: (
        (nn.ReLU6, "forward"), (nn.Hardtanh, "forward"), (F, "hardtanh"),
        (torch._C._nn, "hardtanh_"),
    ),
    nn.Hardswish: (
        (nn.Hardswish, "forward"), (F, "hardswish"), (torch._C._nn, "hardswish_"),
    ),
    nn.Identity: ((nn.Identity, "forward"), (nn.Identity, "__call__")),
    nn.Hardsigmoid: (
        (nn.Hardsigmoid, "forward"), (F, "hardsigmoid"), (torch._C._nn, "hardsigmoid_"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", BELOW, ids=lambda kind: kind.__name__)
def test_code_below_an_activation_is_called_as_often_as_by_stock(
    kind: type[nn.Module], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network().train(training)
    surgery.set_activations(model, kind)
    block = model.features[2][0]
    with torch.set_grad_enabled(training):
        model(X)
        assert explain(block) is None
        for target in BELOW[kind]:
            with monkeypatch.context() as patch:
                calls = replace_method(patch, *target)
                assert str(explain(block)).endswith("is replaced")
                ours = count(model, X, calls)
                with use_backend("reference"):
                    assert ours == count(model, X, calls) > 0
        assert explain(block) is None


@pytest.mark.parametrize("kind", BELOW, ids=lambda kind: kind.__name__)
def test_blocks_without_an_activation_do_not_mind_what_is_below_it(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = network().features[2][0]
    for target in BELOW[kind]:
        replace_method(monkeypatch, *target)
    assert explain(block) is None
