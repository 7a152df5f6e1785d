"""Networks whose forward returns more than a tensor: transformers', MONAI's and smp's, accelerated.

Each against its package's own: numbers, layouts, plan, deploy, and edits that the plan must see.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import foreign_networks
from effnet_fast.inference.own_plan import plan_of
from networks import Pair, Trio, random_images, run_network
from tolerances import assert_parity

SIDE = 64


def _transformers(kind: str, **changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
    config = transformers.EfficientNetConfig(num_labels=10, **small | changes)
    made: nn.Module = getattr(transformers, kind)(config)
    return made


def _monai(kind: str) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets.efficientnet", reason="MONAI is not installed")
    made: nn.Module = getattr(nets, kind)("efficientnet-b0", pretrained=False, num_classes=10)
    return made


def _smp(name: str, depth: int) -> nn.Module:
    why = "segmentation_models_pytorch is not installed"
    smp = pytest.importorskip("segmentation_models_pytorch", reason=why)
    made: nn.Module = smp.encoders.get_encoder(name, weights=None, depth=depth)
    return made


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "transformers": functools.partial(_transformers, "EfficientNetForImageClassification"),
    "transformers model": functools.partial(_transformers, "EfficientNetModel"),
    "monai": functools.partial(_monai, "EfficientNetBN"),
    "monai encoder": functools.partial(_monai, "EfficientNetBNFeatures"),
    "smp": functools.partial(_smp, "efficientnet-b0", 5),
    "smp, three maps": functools.partial(_smp, "efficientnet-b0", 3),
    "smp of timm": functools.partial(_smp, "timm-efficientnet-b0", 5),
    "smp of timm, three maps": functools.partial(_smp, "timm-tf_efficientnet_lite0", 3),
}


@functools.cache
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKERS[name]()
        foreign_networks.calibrate(model, SIDE)
    return model


def trio(name: str) -> Trio:
    stock = copy.deepcopy(_made(name))
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    return Trio(actual, stock, copy.deepcopy(stock).double())


def named(output: Any) -> dict[str, Tensor]:
    """Every tensor of what a network returns, by name."""
    if isinstance(output, Tensor):
        return {"y": output}
    rows = output.items() if hasattr(output, "items") else enumerate(output)
    return {f"y {key}": value for key, value in rows}


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return named(model(x))


def is_planned(model: nn.Module) -> bool:
    snapshot = plan_of(model).snapshot
    return snapshot is not None and bool(snapshot.engines)


@pytest.mark.parametrize("name", MAKERS)
def test_inference_in_one_call(name: str) -> None:
    models, x = trio(name), random_images(2, SIDE)
    for given in (x, x.to(memory_format=torch.channels_last)):
        ours, theirs = run(models.actual, given), run(models.stock, given)
        assert list(ours) == list(theirs)
        assert_parity(ours, theirs, run(models.exact, given.double()))
        assert [y.stride() for y in ours.values()] == [y.stride() for y in theirs.values()]
    assert is_planned(models.actual)
    networks = effnet_fast.doctor(models.actual).networks or []
    assert networks[0].eval == "one call"


@pytest.mark.parametrize("name", ["transformers", "transformers model", "monai", "smp"])
def test_sync_batch_norm_infers_as_batch_norm(name: str) -> None:
    models, x = trio(name), random_images(1, SIDE)
    expected = run(models.actual, x)
    nn.SyncBatchNorm.convert_sync_batchnorm(models.actual)
    actual = run(models.actual, x)
    assert is_planned(models.actual)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", MAKERS)
def test_deploy(name: str) -> None:
    models, x = trio(name), random_images(2, SIDE)
    for model in (models.actual, models.stock):
        deployed = effnet_fast.deploy(model)
        result = deployed(x)
        assert type(result) is type(models.stock(x))
        assert_parity(named(result), run(models.stock, x), run(models.exact, x.double()))


def _as_tensor(model: nn.Module) -> nn.Module:
    """A network of one tensor: what is returned, side by side."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            maps = [y.flatten(1) for y in named(self.inner(x)).values()]
            return torch.cat(maps, 1)

    return Joined()


@pytest.mark.parametrize("name", ["transformers", "monai", "smp, three maps"])
def test_a_training_step(name: str) -> None:
    models = trio(name)
    Pair(_as_tensor(models.actual), _as_tensor(models.stock)).train().assert_alike(
        random_images(4, SIDE)
    )


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("transformers", lambda m: m.efficientnet.encoder.top_bn.bias.data.add_(0.5)),
        ("transformers", lambda m: m.efficientnet.register_forward_pre_hook(_double)),
        ("transformers", lambda m: m.efficientnet.encoder.register_forward_pre_hook(_double)),
        ("transformers", lambda m: setattr(m.efficientnet, "pooler", nn.AdaptiveMaxPool2d(1))),
        ("transformers", lambda m: m.efficientnet.encoder.blocks.insert(4, _block(m))),
        ("transformers model", lambda m: setattr(m.pooler, "ceil_mode", True)),
        ("transformers model", lambda m: m.encoder.top_bn.weight.data.mul_(2)),
        ("monai", lambda m: setattr(m._conv_stem_padding, "padding", (1, 0, 1, 0))),
        ("monai", lambda m: m._blocks[2].register_forward_pre_hook(_double)),
        ("monai", lambda m: m.set_swish(memory_efficient=False)),
        ("monai encoder", lambda m: m.extract_stacks.remove(2)),
        ("smp", lambda m: m._out_indexes.__setitem__(2, 7)),
        ("smp", lambda m: setattr(m, "_depth", 4)),
        ("smp", lambda m: m.make_dilated(16)),
        ("smp", lambda m: m._swish.register_forward_pre_hook(_double)),
        ("smp of timm", lambda m: setattr(m, "_depth", 2)),
        ("smp of timm", lambda m: m.blocks[6].register_forward_pre_hook(_double)),
        ("smp of timm", lambda m: m.blocks.register_forward_pre_hook(_double)),
        ("smp of timm, three maps", lambda m: setattr(m.bn1, "act", nn.ReLU())),
    ],
)
def test_an_edit_after_the_plan(name: str, edit: Callable[[Any], object]) -> None:
    models, x = trio(name), random_images(2, SIDE)
    run(models.actual, x)
    for model in models.models:
        edit(model)
    ours, theirs = run(models.actual, x), run(models.stock, x)
    assert list(ours) == list(theirs)
    assert_parity(ours, theirs, run(models.exact, x.double()))


def _double(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] * 2, *inputs[1:])


def _block(model: Any) -> nn.Module:
    return model.efficientnet.encoder.blocks[4]


class TestTransformers:
    def test_what_a_call_may_ask_for(self) -> None:
        models, x = trio("transformers"), random_images(2, SIDE)
        labels = torch.tensor([1, 2])
        calls: list[Callable[[Any], Any]] = [
            lambda m: m(pixel_values=x),
            lambda m: m(pixel_values=x, labels=labels),
            lambda m: m(x, labels),
            lambda m: m(x, return_dict=True),
            lambda m: m(x, return_dict=False),
            lambda m: m(x, None, True),
            lambda m: m(x, output_hidden_states=True).hidden_states,
        ]
        for call in calls:
            with torch.no_grad():
                ours, theirs = named(call(models.actual)), named(call(models.stock))
            assert list(ours) == list(theirs)
            for key, expected in theirs.items():
                torch.testing.assert_close(ours[key], expected, rtol=1e-3, atol=1e-3)
        with pytest.raises(ValueError, match="pixel_values"):
            models.actual()

    def test_its_loss_trains(self) -> None:
        models = trio("transformers").train()
        x, labels, losses = random_images(4, SIDE), torch.tensor([1, 2, 3, 4]), []
        for model in (models.actual, models.stock):
            torch.manual_seed(0)
            loss = model(pixel_values=x, labels=labels).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)

    def test_its_config_is_read_at_each_call(self) -> None:
        models, x = trio("transformers"), random_images(1, SIDE)
        deployed = effnet_fast.deploy(models.actual)
        run(models.actual, x)
        for model in models.models:
            model.config.output_hidden_states = True
        assert list(run(models.actual, x)) == list(run(models.stock, x))
        with pytest.raises(RuntimeError, match="hidden states"):
            deployed(x)

    def test_maps_above_the_pools_window(self) -> None:
        torch.manual_seed(0)
        stock = _transformers("EfficientNetForImageClassification").eval()
        stock.efficientnet.pooler = nn.AvgPool2d(2, ceil_mode=True)
        actual = effnet_fast.accelerate(copy.deepcopy(stock))
        x = random_images(1, 64)
        for key, expected in run(stock, x).items():
            torch.testing.assert_close(run(actual, x)[key], expected, rtol=1e-3, atol=1e-3)
        assert is_planned(actual)
        deployed = effnet_fast.deploy(actual)
        for model in (actual.train(), stock.train(), actual.eval(), stock.eval()):
            with pytest.raises(RuntimeError):  # its reshape
                model(random_images(2, 96))
        with pytest.raises(
            ValueError, match="too large: the last map may have a side of at most 2"
        ):
            deployed(random_images(1, 96))


def test_copies_and_pickles() -> None:
    models, x = trio("smp"), random_images(1, SIDE)
    y = run(models.actual, x)
    loaded = pickle.loads(pickle.dumps(models.actual))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in models.stock.modules()]
    for other in (copy.deepcopy(models.actual), effnet_fast.accelerate(loaded)):
        assert all(map(torch.equal, run(other, x).values(), y.values()))
    effnet_fast.restore(models.actual)
    restored = run_network(_as_tensor(models.actual), x, backward=False)
    assert torch.equal(restored["y"], run_network(_as_tensor(models.stock), x, backward=False)["y"])
