"""Encoders whose maps are those that segmentation_models_pytorch takes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import networks
from effnet_fast.inference.own_plan import plan_of
from effnet_fast.models import VARIANTS, EfficientNetFeatures
from effnet_fast.models.feature_info import FeatureInfo, describe, ends_of
from networks import random_images

# B0's stages, of few channels.
SMALL = replace(VARIANTS["b0"], name="small", width=0.25)
X = random_images(2, 64)
# Channels and places of blocks of smp 0.6's table, encoders/efficientnet.py: (C, the last block).
SMP = {
    "b0": ([32, 24, 40, 112, 320], [2, 4, 8, 15]),
    "b1": ([32, 24, 40, 112, 320], [4, 7, 15, 22]),
    "b4": ([48, 32, 56, 160, 448], [5, 9, 21, 31]),
    "b7": ([64, 48, 80, 224, 640], [10, 17, 37, 54]),
}


def encoder(**options: object) -> EfficientNetFeatures:
    model = EfficientNetFeatures(SMALL, endpoints="smp", **options)  # type: ignore[arg-type]
    model.load_state_dict(networks.calibrated_state(SMALL))
    return model.eval()


def expected(model: EfficientNetFeatures, x: Tensor) -> list[Tensor]:
    """The maps by the modules themselves, as smp's forward takes them."""
    maps = []
    modules = {name: m for name, m in model.named_modules() if name.count(".") <= 2}
    for name, module in modules.items():
        is_block = name.count(".") == 2 and not name.startswith("features.0.")
        if name == "features.0" or is_block:
            x = module(x)
        if name in ("features.0", "features.2.1", "features.3.1", "features.5.0", "features.7.0"):
            maps.append(x)
    return maps


def block_of(row: dict, variant: str) -> int:
    """The place of a map's block among all."""
    stages = VARIANTS[variant].stages
    before = sum(stage.repeats for stage in stages[: row["stage"] - 1])
    return before + row.get("block", stages[row["stage"] - 1].repeats - 1)


@pytest.mark.parametrize("name", SMP)
def test_the_table_of_smp(name: str) -> None:
    variant = VARIANTS[name]
    info = FeatureInfo(describe(variant), None, ends_of(variant, "smp"))
    other = FeatureInfo(describe(variant), None, ends_of(variant, "smp_timm"))
    channels, blocks = SMP[name]
    assert info.channels() == channels == other.channels()
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert [block_of(row, name) for row in info[1:]] == blocks
    assert other.module_name() == [f"features.{i}" for i in (0, 2, 3, 5, 7)]


@pytest.mark.parametrize("out_indices", [None, (0, 3), (3,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("plan", [False, True])
def test_maps(out_indices: object, plan: bool) -> None:
    model = encoder(out_indices=out_indices)
    model.plan = plan
    whole = expected(encoder(), X)
    taken = range(5) if out_indices is None else out_indices
    with torch.no_grad():
        maps = model(X)
    assert (model._own_plan.snapshot is not None) == plan
    assert len(maps) == len(list(taken))
    for actual, index in zip(maps, taken, strict=True):
        torch.testing.assert_close(actual, whole[index], rtol=1e-3, atol=1e-4)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()


def test_gradients_and_statistics() -> None:
    model, stock = encoder().train(), encoder(backend="reference").train()
    results = []
    for network in (model, stock):
        torch.manual_seed(0)
        sum(m.square().mean() for m in network(X)).backward()
        grads = {f"grad {k}": p.grad for k, p in network.named_parameters()}
        buffers = {f"buffer {k}": b for k, b in network.named_buffers()}
        results.append(grads | buffers)
    networks.assert_alike(*results)


def test_copies_deploy_and_torchscript() -> None:
    model = encoder()
    with torch.no_grad():
        maps = model(X)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, other(X), maps))
        deployed, scripted = effnet_fast.deploy(model)(X), torch.jit.script(model)(X)
    for actual in (deployed, scripted):
        assert len(actual) == len(maps)
        for a, b in zip(actual, maps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_hook_on_the_stage_is_refused_and_on_its_blocks_runs() -> None:
    model, seen = encoder(), []
    with torch.no_grad():
        before = model(X)
        handle = model.features[5][0].register_forward_hook(lambda *args: seen.append(args[2]))
        after = model(X)
        assert len(seen) == 1
        torch.testing.assert_close(after[3], seen[0])
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        handle.remove()
        handle = model.features[5].register_forward_hook(lambda *args: args[2] * 2)
        with pytest.raises(RuntimeError, match=r"features\.5 .*hook its blocks instead"):
            model(X)
        handle.remove()
        model.features[5] = nn.Identity()
        with pytest.raises(RuntimeError, match=r"features\.5 is Identity, not Sequential"):
            model(X)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="endpoints must be one of timm, smp, smp_timm, got 'tf'"):
        effnet_fast.efficientnet_b0(features_only=True, endpoints="tf")


def test_plan_of_foreign_features_is_none_of_its_concern() -> None:
    """The child `features` keeps a plan of its own, of stages."""
    model = encoder()
    with torch.no_grad():
        torch.testing.assert_close(model.features(X), model(X)[-1], rtol=1e-3, atol=1e-4)
    assert plan_of(model.features).snapshot is not None
