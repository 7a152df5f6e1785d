"""Freezing the first layers, and undoing it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, assert_alike, pair, random_images, run_network

X = random_images(4, 48)


def norms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def assert_frozen(model: nn.Module, children: int, bn: bool = True) -> None:
    """The first children of features are frozen in a model in training, and nothing else is."""
    for index, child in enumerate(model.features):
        frozen = index < children
        assert all(p.requires_grad is not frozen for p in child.parameters()), index
        assert all(norm.training is not (frozen and bn) for norm in norms(child)), index
        assert child.training, "modules other than the norms keep the network's mode"
    assert all(p.requires_grad for p in model.classifier.parameters())


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize(
    ("stages", "children"), [(0, 0), (1, 2), (3, 4), (7, 8), (None, 9)], ids=str
)
def test_stages(stages: int | None, children: int, bn: bool) -> None:
    model = EfficientNet(TINY)
    assert model.freeze(stages, bn=bn) is model
    assert_frozen(model, children, bn)
    assert_frozen(model.eval().train(), children, bn)
    assert not any(norm.training for norm in norms(model.eval()))
    assert_frozen(model.train().unfreeze(), 0)


def test_step_of_a_frozen_network() -> None:
    """Outputs, gradients and statistics are those of torchvision's network frozen by hand."""
    models = pair().train()
    models.actual.freeze(3)
    models.stock.features[:4].requires_grad_(False)
    for norm in norms(models.stock.features[:4]):
        norm.eval()
    before = {k: v.clone() for k, v in models.actual.named_buffers()}
    results = [run_network(model, X) for model in models.models]
    assert_alike(*results)
    for name, buffer in before.items():
        still = int(name.split(".")[1]) < 4
        assert torch.equal(results[0][f"buffer {name}"], buffer) is still, name


def test_survives_copies_and_leaves_the_state_dict_alone() -> None:
    model = EfficientNet(TINY)
    keys = list(model.state_dict())
    model.freeze(2)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_frozen(other.eval().train(), 3)
        assert_frozen(other.unfreeze(), 0)
    assert_frozen(model.train(), 3)
    model.load_state_dict(EfficientNet(TINY).state_dict())
    assert_frozen(model.train(), 3)


def test_another_freeze_takes_the_place_of_the_first() -> None:
    model = EfficientNet(TINY).freeze(5)
    assert_frozen(model.freeze(2), 3)
    assert_frozen(model.freeze(4, bn=False), 5, bn=False)
    assert_frozen(model.freeze(0), 0)


def test_what_was_frozen_by_hand_stays_so() -> None:
    model = EfficientNet(TINY)
    model.features[1][0].block[0][0].weight.requires_grad_(False)
    model.features[8][0].weight.requires_grad_(False)
    model.freeze(3).unfreeze()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["features.1.0.block.0.0.weight", "features.8.0.weight"]


def test_unfrozen_in_eval_mode() -> None:
    model = EfficientNet(TINY).eval().freeze(2).unfreeze()
    assert not any(norm.training for norm in norms(model))


def test_converted_norms_are_held_too() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(EfficientNet(TINY).freeze(2))
    assert_frozen(model.train(), 3)
    assert_frozen(model.unfreeze(), 0)


def test_encoder() -> None:
    model = EfficientNetFeatures(TINY, out_indices=(1, 2))
    model.freeze(3)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(norm.training for norm in norms(model.train()))
    with pytest.raises(ValueError, match="between 0 and 3"):
        model.freeze(4)


@pytest.mark.parametrize("stages", [-1, 8, 1.0, True, "2"], ids=str)
def test_refuses(stages: object) -> None:
    model = EfficientNet(TINY).freeze(2)
    with pytest.raises(ValueError, match=r"stages must be an int between 0 and 7, or None .*got"):
        model.freeze(stages)  # type: ignore[arg-type]
    assert_frozen(model, 3)
