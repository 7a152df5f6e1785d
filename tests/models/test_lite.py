"""EfficientNet-Lite0 to Lite4: structure, names, and the logits of other packages' networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import trained
from effnet_fast import EfficientNet, checkpoints
from effnet_fast.models import VARIANTS
from effnet_fast.modules.layers import MBConv
from effnet_fast.pretrained import weights
from effnet_fast.scaling import count
from networks import LITES, PARAMETERS, rms
from tolerances import assert_no_worse_than

# width, depth, resolution, dropout; repeats; channels of the stages: lite_builder.py of TensorFlow.
TABLE = {
    "lite0": (1.0, 1.0, 224, 0.2, [1, 2, 2, 3, 3, 4, 1], [16, 24, 40, 80, 112, 192, 320]),
    "lite1": (1.0, 1.1, 240, 0.2, [1, 3, 3, 4, 4, 5, 1], [16, 24, 40, 80, 112, 192, 320]),
    "lite2": (1.1, 1.2, 260, 0.3, [1, 3, 3, 4, 4, 5, 1], [16, 24, 48, 88, 120, 208, 352]),
    "lite3": (1.2, 1.4, 280, 0.3, [1, 3, 3, 5, 5, 6, 1], [24, 32, 48, 96, 136, 232, 384]),
    "lite4": (1.4, 1.8, 300, 0.3, [1, 4, 4, 6, 6, 8, 1], [24, 32, 56, 112, 160, 272, 448]),
}
TRAINED = ["lite0", *(pytest.param(size, marks=pytest.mark.slow) for size in ("lite1", "lite2"))]


def on_meta(size: str) -> EfficientNet:
    with torch.device("meta"):
        return getattr(effnet_fast, f"efficientnet_{size}")()


def described(state: dict[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, value.shape, value.dtype) for key, value in state.items()]


def assert_logits(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Both against theirs in float64, where ours must be the same network."""
    with torch.no_grad():
        actual, stock = ours(x), theirs(x)
        exact = theirs.double()(x.double())
        assert rms(ours.double()(x.double()) - exact) <= 1e-12 * rms(exact)
    assert_no_worse_than(actual, stock, exact)
    assert rms(exact[0] - exact[1]) > 100 * rms(stock - exact)


@pytest.mark.parametrize("size", LITES)
class TestStructure:
    def test_table(self, size: str) -> None:
        width, depth, resolution, dropout, repeats, channels = TABLE[size]
        variant, model = VARIANTS[size], on_meta(size)
        assert (variant.width, variant.depth) == (width, depth)
        assert (variant.resolution, variant.dropout) == (resolution, dropout)
        assert [len(stage) for stage in model.features[1:-1]] == repeats
        assert [stage[-1].out_channels for stage in model.features[1:-1]] == channels
        assert model.features[0][0].out_channels == 32
        assert model.features[-1][0].out_channels == model.num_features == 1280
        assert model.classifier[0].p == dropout

    def test_parameters(self, size: str) -> None:
        model = on_meta(size)
        found = sum(parameter.numel() for parameter in model.parameters())
        assert found == count(VARIANTS[size]).parameters == PARAMETERS[size]

    def test_modules(self, size: str) -> None:
        """Children numbered as torchvision would number them, ReLU6, no squeeze-and-excitation."""
        model = on_meta(size)
        blocks = [m for m in model.modules() if isinstance(m, MBConv)]
        assert [list(b.block._modules) for b in blocks[:2]] == [["0", "1"], ["0", "1", "2"]]
        for block in blocks:
            *before, project = block.block
            assert [type(layer[2]) for layer in before] == [nn.ReLU6] * len(before)
            assert len(project) == 2
        assert type(model.features[0][2]) is type(model.features[-1][2]) is nn.ReLU6
        kinds = {type(m) for m in model.modules()}
        assert not kinds & {nn.SiLU, nn.Sigmoid, nn.AdaptiveAvgPool2d} - {type(model.avgpool)}
        norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert norms == {(1e-3, 0.01)}
        strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        assert {type(m).__name__ for m in strided} == {"Conv2dSame"}

    @pytest.mark.parametrize("family", ["timm", "timm_tf", "lukemelas"])
    def test_names_and_order_are_the_familys(self, size: str, family: str) -> None:
        ours = on_meta(size).state_dict()
        theirs = _network_of(family, size).state_dict()
        assert described(checkpoints.convert(ours, family)) == described(theirs)
        assert described(checkpoints.convert(theirs)) == described(ours)


def _network_of(family: str, size: str) -> nn.Module:
    with torch.device("meta"):
        if family == "lukemelas":
            from efficientnet_lite_pytorch import EfficientNet as Lite

            return Lite.from_name(f"efficientnet-{size}", image_size=None)
        import timm

        prefix = "tf_" if family == "timm_tf" else ""
        return timm.create_model(f"{prefix}efficientnet_{size}")


@pytest.mark.parametrize("size", TRAINED)
def test_logits_are_those_of_the_packages_own_network(size: str) -> None:
    """Whose padding is frozen for the size that it was made for."""
    from efficientnet_lite_pytorch import EfficientNet as Lite

    enum = weights.get_model_weights(f"efficientnet_{size}")
    theirs = Lite.from_name(f"efficientnet-{size}").eval()
    theirs.load_state_dict(torch.load(enum.DEFAULT.package.find(), weights_only=True))
    x = trained.photographs(VARIANTS[size].resolution)[:2]
    assert_logits(trained.network(size), theirs, x)


@pytest.mark.parametrize("side", [128, pytest.param(97, marks=pytest.mark.slow)])
def test_logits_are_those_of_timms_tf_network(side: int) -> None:
    import timm

    model = trained.network()
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(checkpoints.convert(model.state_dict(), "timm_tf"))
    assert_logits(model, theirs, trained.photographs(side))


@pytest.mark.slow
def test_random_draws_do_not_depend_on_the_backend() -> None:
    x, states = trained.photographs(64), []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = effnet_fast.efficientnet_lite0(backend=backend)
        model(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_encoder() -> None:
    model = effnet_fast.efficientnet_lite0(weights="DEFAULT", features_only=True).eval()
    whole = trained.network()
    x = trained.photographs(64)
    with torch.no_grad():
        maps = whole.forward_intermediates(x, intermediates_only=True)
        assert all(rms(a - b) <= 1e-5 * rms(b) for a, b in zip(model(x), maps, strict=True))


@pytest.mark.parametrize("activation", ["silu6", "", None])
def test_refuses_unknown_activations(activation: object) -> None:
    from dataclasses import replace

    with pytest.raises(
        ValueError, match="activation must be one of silu, identity, relu, relu6, h"
    ):
        replace(VARIANTS["lite0"], activation=activation)
