"""Snapshots of networks: what they notice, what they pack, and that copies of keepers are empty."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast.inference.own_plan import OwnPlan
from effnet_fast.inference.snapshot import Snapshot
from effnet_fast.models import EfficientNet
from networks import TINY

FP32 = torch.float32
CHANGES: dict[str, Callable[[EfficientNet], object]] = {
    "weight": lambda m: m.classifier[1].bias.data.fill_(3),
    "layer": lambda m: m.features.pop(3),
    "method": lambda m: setattr(m, "forward_head", m.forward_head),
    "class": lambda m: setattr(m, "__class__", type("Own", (EfficientNet,), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    model = EfficientNet(TINY).eval()
    snapshot = Snapshot(model)
    assert snapshot.is_fresh(model)
    CHANGES[change](model)
    assert not snapshot.is_fresh(model)


def test_each_engine_is_packed_once() -> None:
    snapshot = Snapshot(EfficientNet(TINY).eval())
    engine = snapshot.engine_for(FP32, "cpu")
    assert snapshot.engine_for(FP32, "cpu") is engine
    assert snapshot.engine_for(torch.bfloat16, "cpu") is not engine
    assert len(snapshot.engines) == 2


def test_a_stale_snapshot_is_replaced_and_a_fresh_one_kept() -> None:
    model, keeper = EfficientNet(TINY).eval(), OwnPlan()
    first = keeper.current(model)
    assert first is not None
    assert keeper.current(model) is first
    first.engine_for(FP32, "cpu")
    CHANGES["weight"](model)
    assert keeper.current(model) not in (None, first)


def test_a_changed_replica_is_not_taken_for_its_original() -> None:
    model = EfficientNet(TINY, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (1, 5)
        replica = model._replicate_for_data_parallel()
        replica.classifier = nn.Linear(model.num_features, 3)
        assert replica(x).shape == (1, 3)
        assert model(x).shape == (1, 5)


def test_what_an_engine_was_packed_for_cannot_be_set() -> None:
    deployed = effnet_fast.deploy(EfficientNet(TINY).eval())
    for name in ("dtype", "backend", "graphs"):
        with pytest.raises(AttributeError, match=name):
            setattr(deployed, name, None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))])
def test_copies_of_a_keeper_hold_nothing(copied: Callable[[object], object]) -> None:
    model = EfficientNet(TINY).eval()
    deployed = effnet_fast.deploy(model, torch.bfloat16)
    model._own_plan.current(model)
    for keeper in (model._own_plan, deployed._packed):
        assert keeper.snapshot is not None
        other = copied(keeper)
        assert type(other) is type(keeper)
        assert other.snapshot is None
    assert copied(deployed._packed).dtype is torch.bfloat16
