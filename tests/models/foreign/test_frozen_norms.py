"""torchvision's FrozenBatchNorm2d, which detection puts in the place of every BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import effnet_fast
import foreign_networks
from effnet_fast.inference.own_plan import plan_of
from networks import Pair, Trio, assert_alike, random_images, run_network
from tolerances import assert_parity


def frozen(module: nn.Module) -> nn.Module:
    """The network with its BatchNorms frozen, as torchvision's detection models have them."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(child.num_features, child.eps)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            frozen(child)
    return module


def trio(name: str = "torchvision small") -> Trio:
    stock = frozen(foreign_networks.trio(name).stock)
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    return Trio(actual, stock, copy.deepcopy(stock).double())


X = random_images(4, foreign_networks.RESOLUTION)


def test_every_block_is_fused_and_the_network_runs_in_one_call() -> None:
    models = trio()
    for training in (False, True):
        report = effnet_fast.doctor(models.actual.train(training))
        assert report.blocks
        assert [block.reason for block in report.blocks] == [None] * len(report.blocks)
        assert [course.eval for course in report.networks or []] == ["one call"]


def test_logits_and_deploy() -> None:
    models = trio()
    with torch.no_grad():
        theirs, exact = {"y": models.stock(X)}, {"y": models.exact(X.double())}
        for model in (models.actual, effnet_fast.deploy(models.actual)):
            assert_parity({"y": model(X)}, theirs, exact)
        assert plan_of(models.actual).snapshot is not None
        pair = Pair(models.actual, models.stock)
        for model in pair.models:
            model.get_buffer("features.1.0.block.0.1.running_var").mul_(4)
        pair.assert_alike(X, backward=False)


def test_training_steps() -> None:
    models = trio().train()
    models.assert_parity(*(random_images(4, 64, seed=seed) for seed in range(2)))
    assert not [p for p in models.actual.buffers() if p.grad is not None]


@pytest.mark.parametrize("training", [False, True])
def test_dtypes_are_those_of_stock(training: bool) -> None:
    """A frozen norm multiplies by its buffers: of fp32 they make fp32 of bf16 images."""
    models = trio().train(training)
    block, plain = (m.get_submodule("features.2.0") for m in (models.actual, models.stock))
    h = torch.randn(2, 16, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(h).dtype is plain(h).dtype
        assert models.actual(X).dtype is models.stock(X).dtype
    for model in (block, plain):
        model.bfloat16()
    with torch.no_grad():
        assert block(h.bfloat16()).dtype is plain(h.bfloat16()).dtype is torch.bfloat16


def test_a_norm_with_a_hook_runs_as_stock() -> None:
    models = trio()
    for model in models.models:
        norm = model.get_submodule("features.1.0.block.0.1")
        norm.register_forward_hook(lambda module, inputs, y: y * 2)
    actual, stock = (run_network(m, X) for m in (models.actual, models.stock))
    assert_alike(actual, stock)
