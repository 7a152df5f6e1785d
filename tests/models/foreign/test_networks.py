"""torchvision's and timm's networks, accelerated: their numbers, plans, encoders and edits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import effnet_fast
import foreign_networks
from effnet_fast.inference.own_plan import plan_of
from effnet_fast.modules import foreign
from foreign_networks import NETWORKS, RESOLUTION, SMOOTH, trio
from networks import Pair, random_images, run_network
from tolerances import assert_parity

DEPLOYED = (
    *("torchvision b0", "torchvision v2_s", "tf_efficientnet_b0", "tf_efficientnetv2_b0"),
    *("efficientnet_pytorch", "efficientnet_lite_pytorch", "mobilenetv3_large_100"),
)
MAPS = ("efficientnet_b0", "tf_efficientnetv2_b0", "tf_efficientnet_lite0")


def images(count: int = 2, seed: int = 0) -> Tensor:
    return random_images(count, RESOLUTION, seed=seed)


def two(name: str) -> Pair:
    """A network accelerated, and as its package has it."""
    models = trio(name)
    return Pair(models.actual, models.stock)


def is_planned(model: nn.Module) -> bool:
    """Whether its last forward ran from packed weights."""
    snapshot = plan_of(model).snapshot
    return snapshot is not None and bool(snapshot.engines)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name: str) -> None:
    models, x = trio(name), images()
    with torch.no_grad():
        results = ({"y": m(x)} for m in (models.actual, models.stock))
        assert_parity(*results, {"y": models.exact(x.double())})
    assert is_planned(models.actual)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_three_training_steps_from_the_same_state(name: str) -> None:
    models = trio(name).train()
    models.assert_parity(*(images(4, seed) for seed in range(3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_fused_in_training(name: str) -> None:
    report = effnet_fast.doctor(trio(name).actual.train())
    assert report.blocks
    refused = {block.name: block.reason for block in report.blocks if block.reason}
    # A 1x1 convolution with an activation, which is no block of any kind.
    expected = ["blocks.6.0"] if name == "mobilenetv3_large_100" else []
    assert list(refused) == expected
    courses = [network.training for network in report.networks or []]
    assert courses == ["block by block"]


def test_a_plain_model_is_never_stale() -> None:
    models, x = two("efficientnet_b0"), images()
    with torch.no_grad():
        models.actual(x)
        for edit in (
            lambda m: m.blocks[2][0].conv_dw.weight.data[0, 0, 0].mul_(3),
            lambda m: m.bn1.bias.data.add_(0.25),
            lambda m: m.classifier.weight.numpy().__setitem__((0, 0), 4.0),
            lambda m: setattr(m, "conv_stem", copy.deepcopy(m.conv_stem).double().float()),
            lambda m: m.conv_stem.weight.data.neg_(),
            lambda m: setattr(m.blocks[1], "0", copy.deepcopy(m.blocks[1][0])),
            lambda m: m.blocks[1][0].bn2.bias.data.sub_(1.5),
            lambda m: setattr(m.bn2, "act", nn.ReLU()),
            lambda m: setattr(m.global_pool, "pool", nn.AdaptiveMaxPool2d(1)),
            lambda m: m.blocks[3][1].register_forward_hook(lambda *a: a[-1] * 2),
            lambda m: setattr(m.blocks[4][1], "has_skip", False),
        ):
            models.apply(edit)
            models.assert_alike(x, backward=False)


def test_lists_among_settings_may_be_edited() -> None:
    """efficientnet_pytorch keeps strides in lists, and tells forward whether to drop."""
    models, x = two("efficientnet_pytorch"), images()
    with torch.no_grad():
        before = models.assert_alike(x, backward=False)["y"]
        assert is_planned(models.actual)
        for edit in (
            lambda m: m._blocks[3]._depthwise_conv.stride.__setitem__(slice(None), [1, 1]),
            lambda m: m._blocks[3]._depthwise_conv.stride.__setitem__(slice(None), [2, 2]),
            lambda m: m._blocks[4].train(),
            lambda m: m._blocks[4].eval(),
            lambda m: m._dropout.train(),
            lambda m: m._dropout.eval(),
            lambda m: setattr(m, "_swish", nn.ReLU()),
            lambda m: setattr(m._blocks[1]._depthwise_conv.static_padding, "padding", (1, 1, 1, 1)),
            lambda m: m._blocks.insert(3, m._blocks[2]),
        ):
            models.apply(edit)
            models.assert_alike(x, backward=False)
        assert not torch.equal(models.actual(x), before)


def test_methods_that_are_replaced_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    models, x = two("efficientnet_b0"), images()
    kind = timm.models.EfficientNet
    with torch.no_grad():
        before = models.assert_alike(x, backward=False)["y"]
        for name, replacement in (
            ("forward_head", lambda self, x: x.mean()),
            ("forward_features", lambda self, x: self.conv_stem(x)),
            ("forward", lambda self, x: x + 1),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, replacement)
                if name == "forward_features":
                    patch.setattr(kind, "forward_head", lambda self, x: x)
                torch.testing.assert_close(models.actual(x), models.stock(x))
            assert torch.equal(models.actual(x), before)
        models.actual.forward_head = lambda x: x.sum()
        models.stock.forward_head = lambda x: x.sum()
        models.assert_alike(x, backward=False)


def named(maps: list[Tensor]) -> dict[str, Tensor]:
    return {f"map {index}": y.detach() for index, y in enumerate(maps)}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder(name: str, training: bool) -> None:
    options = {"features_only": True, "out_indices": (1, 3, 4)}
    torch.manual_seed(0)
    stock = timm.create_model(name, **options)
    foreign_networks.calibrate(stock)
    stock.train(training)
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    exact = copy.deepcopy(stock).double()
    x = images(4)
    for given in (x, x.to(memory_format=torch.channels_last)):
        with torch.set_grad_enabled(training):
            ours, theirs, truth = map(named, (actual(given), stock(given), exact(given.double())))
        assert_parity(ours, theirs, truth)
        assert [m.stride() for m in ours.values()] == [m.stride() for m in theirs.values()]
    assert is_planned(actual) != training


@pytest.mark.parametrize("name", DEPLOYED)
def test_deploy_takes_it_accelerated_or_not(name: str) -> None:
    models, x = trio(name), images()
    for model in (models.actual, models.stock):
        kind = type(model)
        deployed = effnet_fast.deploy(model)
        assert type(model) is kind
        with torch.no_grad():
            y = {"y": deployed(x)}
            assert_parity(y, {"y": models.stock(x)}, {"y": models.exact(x.double())})
            next(model.parameters()).neg_()
            assert not torch.equal(deployed(x), y["y"])
            next(model.parameters()).neg_()
        assert list(deployed.state_dict()) == list(model.state_dict())
        assert kind.__name__ in repr(deployed)


def test_checkpointing_of_timm_trains() -> None:
    models = two("efficientnet_b0").train()
    models.apply(lambda model: model.set_grad_checkpointing())
    models.assert_alike(images(4))


@pytest.mark.parametrize("name", ["torchvision b0", "efficientnet_b0"])
def test_accelerated_networks_as_files_and_copies(name: str) -> None:
    models, x = trio(name), images()
    stock_kinds = [type(m) for m in models.stock.modules()]
    loaded = pickle.loads(pickle.dumps(models.actual))
    assert [type(m) for m in loaded.modules()] == stock_kinds
    copied = copy.deepcopy(models.actual)
    assert [type(m) for m in copied.modules()] == [type(m) for m in models.actual.modules()]
    assert list(models.actual.state_dict()) == list(models.stock.state_dict())
    with torch.no_grad():
        y = models.actual(x)
        assert torch.equal(copied(x), y)
        assert is_planned(copied)
        assert torch.equal(effnet_fast.accelerate(loaded)(x), y)
        effnet_fast.restore(models.actual)
        assert [type(m) for m in models.actual.modules()] == stock_kinds
        assert torch.equal(models.actual(x), models.stock(x))


def test_arguments_have_their_packages_names() -> None:
    models, x = two("torchvision small"), images()
    block = models.actual.features[4][0]
    h = random_images(2, 8, channels=24)
    with torch.no_grad():
        assert torch.equal(block(input=h), block(h))
        assert torch.equal(models.actual(x=x), models.actual(x))
        for call in (lambda: models.actual(y=x), lambda: block(h, h), lambda: block()):
            with pytest.raises(TypeError):
                call()


def test_the_backend_is_that_of_accelerate() -> None:
    models, x = trio("efficientnet_b0"), images()
    effnet_fast.accelerate(models.actual, backend="reference")
    with torch.no_grad():
        assert torch.equal(models.actual(x), models.stock(x))
    assert not is_planned(models.actual)
    effnet_fast.accelerate(models.actual, backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        models.actual(x)
    effnet_fast.accelerate(models.actual, memory="lean")
    lean = run_network(models.actual.train(), x)
    effnet_fast.accelerate(models.actual)
    assert all(foreign.is_known(type(m)) for m in models.actual.blocks[0])
    models.stock.train()
    fast = run_network(models.stock, x)
    assert lean.keys() == fast.keys()


def _doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def _hook_flatten(model: nn.Module) -> None:
    model.get_submodule("global_pool.flatten").register_forward_hook(_doubled)


def _hook_stage_of_checkpoints(model: Any) -> None:
    model.set_grad_checkpointing()
    model.blocks[1].register_forward_hook(_doubled)


def _patch_scale(model: nn.Module) -> None:
    excite = model.get_submodule("features.1.0.block.1")
    scale: Any = excite._scale
    vars(excite)["_scale"] = lambda x: 2 * scale(x)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("efficientnet_b0", _hook_flatten),
        ("efficientnet_b0", _hook_stage_of_checkpoints),
        ("torchvision b0", _patch_scale),
    ],
)
def test_edits_are_seen_after_a_plan(name: str, edit: Callable[[nn.Module], None]) -> None:
    models, x = two(name), images()
    with torch.no_grad():
        models.actual(x)
        for model in (models.actual, models.stock):
            edit(model)
        expected = models.stock(x)
        torch.testing.assert_close(
            models.actual(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )


def test_checkpoints_count_the_batches_of_blocks_in_training() -> None:
    models, x = two("efficientnet_b0"), images()
    for model in (models.actual, models.stock):
        network: Any = model.eval()
        network.blocks.train()
        network.set_grad_checkpointing()
        network(x).sum().backward()
    counts = (
        [n.num_batches_tracked for n in m.modules() if isinstance(n, nn.BatchNorm2d)]
        for m in (models.actual, models.stock)
    )
    assert len({*map(str, counts)}) == 1
