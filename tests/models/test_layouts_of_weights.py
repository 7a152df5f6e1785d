"""Maps are channels_last from the first convolution on whose weight is, as in torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import networks
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import MINI, random_images

X = random_images(2, 32)
# Of convolutions whose weight is channels_last.
PLACES = {
    "stem": "features.0.0",
    "depthwise": "features.2.0.block.1.0",
    "expand": "features.2.1.block.0.0",
    "project": "features.3.0.block.3.0",
    "excite": "features.1.0.block.1.fc1",
    "none": "",
}
RUNS = ["eval", "train", "plan", "deployed"]


def laid_out(model: nn.Module, place: str) -> nn.Module:
    """The model with contiguous weights, and a channels_last one at that place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = torch.channels_last if name == PLACES[place] else torch.contiguous_format
            weight = module.weight.detach()
            module.weight.data = torch.empty_like(weight, memory_format=last).copy_(weight)
    return model


def stock_strides(place: str, training: bool) -> list[tuple[int, ...]]:
    model = laid_out(networks.torchvision_network(MINI).train(training), place)
    h, strides = X, []
    for child in model.features:
        h = child(h)
        strides.append(h.stride())
    return strides


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", RUNS)
def test_maps(how: str, place: str) -> None:
    expected = stock_strides(place, how == "train")
    encoder = laid_out(EfficientNetFeatures(MINI).train(how == "train"), place)
    stages = encoder.feature_info.get("stage")
    encoder.plan = how == "plan"
    run = effnet_fast.deploy(encoder) if how == "deployed" else encoder
    with torch.set_grad_enabled(how in ("eval", "train")):
        assert [m.stride() for m in run(X)] == [expected[stage] for stage in stages]
        if how in ("eval", "train"):
            model = laid_out(EfficientNet(MINI).train(how == "train"), place)
            y, maps = model.forward_intermediates(X, extra_blocks=True)
            assert [m.stride() for m in (*maps, y)] == expected
            assert model.features(X).stride() == expected[-1]
            assert model.features[:3](X).stride() == expected[2]
            assert model.forward_features(X).stride() == expected[-1]


def test_before_a_module_that_looks() -> None:
    seen = []
    for build in (EfficientNet, networks.torchvision_network):
        model = laid_out(build(MINI).eval(), "depthwise")
        for index in (2, 4):
            model.features[index].register_forward_pre_hook(lambda m, x: seen.append(x[0].stride()))
        model(X)
    assert seen[:2] == seen[2:]


def captured(how: str, model: nn.Module) -> nn.Module:
    if how == "compile":
        torch._dynamo.reset()
        return torch.compile(model, backend="eager", fullgraph=True)
    if how == "export":
        return torch.export.export(model, (X,)).module()
    return torch.jit.trace(model, X) if how == "trace" else torch.fx.symbolic_trace(model)


class Maps(nn.Module):
    """The last map, and those on the way."""

    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        y, maps = self.model.forward_intermediates(x, extra_blocks=True)
        return [*maps, y]


class Last(Maps):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model.forward_features(x)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "place", "kind"),
    [
        ("compile", "depthwise", Maps),
        ("compile", "excite", Last),
        ("export", "depthwise", Last),
        ("trace", "depthwise", Maps),
        ("fx", "depthwise", Last),
        ("fx", "excite", Maps),
    ],
)
def test_captured(how: str, place: str, kind: type[Maps]) -> None:
    expected = stock_strides(place, training=False)
    with torch.no_grad():
        maps = captured(how, kind(laid_out(EfficientNet(MINI).eval(), place)))(X)
    assert [m.stride() for m in maps] == (expected if kind is Maps else expected[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["export", "fx"])
def test_captured_encoder(how: str) -> None:
    expected = stock_strides("depthwise", training=False)
    encoder = laid_out(EfficientNetFeatures(MINI).eval(), "depthwise")
    with torch.no_grad():
        strides = [m.stride() for m in captured(how, encoder)(X)]
    assert strides == [expected[stage] for stage in encoder.feature_info.get("stage")]
