"""Module tree, state dict, parameter counts and random draws: all equal to torchvision's."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

import networks
from effnet_fast import models
from effnet_fast.models import VARIANTS, EfficientNet
from networks import PARAMETERS

HEADS = {"b0": (32, 1280), "b2": (32, 1408), "b4": (48, 1792), "b7": (64, 2560), "v2_l": (32, 1280)}
STAGE_CHANNELS = {
    "b0": [16, 24, 40, 80, 112, 192, 320],
    "b3": [24, 32, 48, 96, 136, 232, 384],
    "b7": [32, 48, 80, 160, 224, 384, 640],
    "v2_m": [24, 48, 80, 160, 176, 304, 512],
}
REPEATS = {"b0": [1, 2, 2, 3, 3, 4, 1], "b4": [2, 4, 4, 6, 6, 8, 2], "b7": [4, 7, 7, 10, 10, 13, 4]}


def build(name: str, **kwargs: object) -> EfficientNet:
    return getattr(models, f"efficientnet_{name}")(**kwargs)


@functools.cache
def on_meta(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, without memory behind them."""
    with torch.device("meta"):
        return build(name), getattr(torchvision.models, f"efficientnet_{name}")()


def closed_formula(width: float, depth: float, classes: int = 1000) -> int:
    """Parameters of an EfficientNet, counted by hand from the paper's table."""

    def scaled(channels: int) -> int:
        n = max(8, int(channels * width + 4) // 8 * 8)
        return n + 8 if n < 0.9 * channels * width else n

    last = scaled(32)
    total = 3 * 9 * last + 2 * last
    rows = [(1, 3, 16, 1), (6, 3, 24, 2), (6, 5, 40, 2), (6, 3, 80, 3)]
    rows += [(6, 5, 112, 3), (6, 5, 192, 4), (6, 3, 320, 1)]
    for ratio, kernel, out, repeats in rows:
        for _ in range(-int(-repeats * depth // 1)):
            mid, squeezed = last * ratio, last // 4
            if ratio != 1:
                total += last * mid + 2 * mid
            total += mid * kernel**2 + 2 * mid
            total += mid * squeezed + squeezed + squeezed * mid + mid
            total += mid * scaled(out) + 2 * scaled(out)
            last = scaled(out)
    head = 4 * last
    return total + last * head + 2 * head + head * classes + classes


@pytest.mark.parametrize("name", networks.PUBLISHED)
class TestAgainstTorchvision:
    @pytest.mark.slow
    def test_prints_the_same(self, name: str) -> None:
        ours, theirs = on_meta(name)
        assert str(ours) == str(theirs)

    def test_module_tree(self, name: str) -> None:
        ours, theirs = on_meta(name)
        tree = {path: type(module) for path, module in ours.named_modules()}
        expected = {path: type(module) for path, module in theirs.named_modules()}
        assert list(tree) == list(expected)
        for path, kind in expected.items():
            if kind is nn.Sequential:
                assert issubclass(tree[path], kind), path
                assert tree[path].__name__ == "Sequential", path
            elif kind.__module__.startswith("torch.nn"):
                assert tree[path] is kind, path
            else:
                assert tree[path].__name__ == kind.__name__, path

    def test_state_dict(self, name: str) -> None:
        ours, theirs = on_meta(name)
        described = [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()]
        assert described == [(k, v.shape, v.dtype) for k, v in theirs.state_dict().items()]
        assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]

    def test_batch_norm_constants_and_drop_rates(self, name: str) -> None:
        ours, theirs = on_meta(name)
        expected = dict(theirs.named_modules())
        for path, module in ours.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.eps, module.momentum) == (
                    expected[path].eps,
                    expected[path].momentum,
                )
            elif hasattr(module, "p"):
                assert module.p == expected[path].p

    def test_parameter_count(self, name: str) -> None:
        ours, _ = on_meta(name)
        assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [*networks.V1, "b8", "l2"])
def test_parameter_count_by_closed_formula(name: str) -> None:
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = build(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == closed_formula(variant.width, variant.depth)


def test_table_of_variants() -> None:
    for name, (stem, head) in HEADS.items():
        assert (VARIANTS[name].stem_channels, VARIANTS[name].head_channels) == (stem, head)
    for name, channels in STAGE_CHANNELS.items():
        assert [stage.out_channels for stage in VARIANTS[name].stages] == channels
    for name, repeats in REPEATS.items():
        assert [stage.repeats for stage in VARIANTS[name].stages] == repeats
        assert VARIANTS[name].blocks == sum(repeats)


@pytest.mark.parametrize("name", networks.PUBLISHED)
def test_preprocessing_is_that_of_torchvisions_weights(name: str) -> None:
    weights = torchvision.models.get_model_weights(f"efficientnet_{name}").IMAGENET1K_V1
    preset = weights.transforms()
    variant = VARIANTS[name]
    assert (variant.resize, variant.crop) == (preset.resize_size[0], preset.crop_size[0])
    assert variant.interpolation == preset.interpolation.value
    assert (list(variant.mean), list(variant.std)) == (preset.mean, preset.std)
    assert weights.meta["num_params"] == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.PUBLISHED)
def test_draws_torchvisions_random_weights(name: str) -> None:
    torch.manual_seed(7)
    ours = build(name).state_dict()
    after = torch.rand(1)
    torch.manual_seed(7)
    theirs = getattr(torchvision.models, f"efficientnet_{name}")().state_dict()
    assert torch.equal(after, torch.rand(1)), "the generator stands elsewhere afterwards"
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def test_loads_a_torchvision_state_dict_strictly_and_back() -> None:
    theirs = torchvision.models.efficientnet_b0()
    ours = build("b0")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


class TestArguments:
    def test_signature_is_keyword_only(self) -> None:
        parameters = inspect.signature(models.efficientnet_b3).parameters
        assert list(parameters)[:2] == ["weights", "progress"]
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
        build: Callable[..., object] = models.efficientnet_b3
        with pytest.raises(TypeError):
            build(None, True, 1000)

    def test_entry_points_have_names_and_docs(self) -> None:
        for name in VARIANTS:
            function = getattr(models, f"efficientnet_{name}")
            assert function.__name__ == function.__qualname__ == f"efficientnet_{name}"
            title = "-".join(part.capitalize() for part in name.split("_"))
            assert function.__doc__.startswith(f"EfficientNet-{title}, for images")
            assert pickle.loads(pickle.dumps(function)) is function

    def test_sizes(self) -> None:
        with torch.device("meta"):
            model = build("b0", num_classes=7, in_chans=1)
        assert model.classifier[1].weight.shape == (7, 1280)
        assert model.features[0][0].weight.shape == (32, 1, 3, 3)

    @pytest.mark.slow
    def test_dropout_and_drop_path(self) -> None:
        with torch.device("meta"):
            ours = build("b1", dropout=0.5, stochastic_depth_prob=0.4)
            theirs = torchvision.models.efficientnet_b1(dropout=0.5, stochastic_depth_prob=0.4)
        assert str(ours) == str(theirs)

    def test_norm_layer_replaces_the_variants_constants(self) -> None:
        norm_layer = functools.partial(nn.BatchNorm2d, eps=0.5, momentum=0.25)
        with torch.device("meta"):
            model = build("b5", norm_layer=norm_layer)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(bn.eps, bn.momentum) for bn in norms} == {(0.5, 0.25)}

    def test_group_norm(self) -> None:
        norm_layer = functools.partial(nn.GroupNorm, 2)
        torch.manual_seed(0)
        ours = EfficientNet(networks.TINY, norm_layer=norm_layer).eval()
        torch.manual_seed(0)
        theirs = networks.torchvision_network(networks.TINY, norm_layer=norm_layer).eval()
        x = networks.random_images(2, 48)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_backend_and_memory_are_kept(self) -> None:
        with torch.device("meta"):
            model = build("b0", backend="reference", memory="lean")
        assert (model.backend, model.memory) == ("reference", "lean")

    @pytest.mark.parametrize(
        ("argument", "value", "allowed"),
        [
            ("num_classes", -1, "at least 0"),
            ("num_classes", 10.0, "int"),
            ("in_chans", -1, "at least 1"),
            ("in_chans", True, "int"),
            ("dropout", 1.5, "between 0 and 1"),
            ("dropout", "0.2", "between 0 and 1"),
            ("stochastic_depth_prob", -0.1, "between 0 and 1"),
            ("backend", "tpu", "reference"),
            ("backend", None, "auto"),
            ("memory", "small", "lean"),
        ],
    )
    def test_bad_arguments_say_what_is_allowed(
        self, argument: str, value: object, allowed: str
    ) -> None:
        with torch.device("meta"), pytest.raises(ValueError, match=f"{argument} .*{allowed}"):
            build("b0", **{argument: value})

    def test_bad_norm_layer(self) -> None:
        with pytest.raises(TypeError, match=r"norm_layer .* got str"):
            build("b0", norm_layer="batch")

    def test_unknown_variant(self) -> None:
        with pytest.raises(ValueError, match=r"b0, b1, .*got 'b9'"):
            EfficientNet("b9")


@pytest.mark.slow
def test_package_does_not_need_torchvision() -> None:
    import ast
    from pathlib import Path

    import effnet_fast

    (root,) = {Path(path) for path in effnet_fast.__path__}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                is_from = isinstance(node, ast.ImportFrom)
                names = [node.module or ""] if is_from else [alias.name for alias in node.names]
                assert not any(name.split(".")[0] == "torchvision" for name in names), path
