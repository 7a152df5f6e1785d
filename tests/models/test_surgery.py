"""What users do to a network: replaced, fused, parametrized, pruned and re-arranged children.

Each change is made alike to our network and to torchvision's, which must then still agree.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import networks
from effnet_fast.modules.explain import explain
from networks import Pair, pair, random_images
from surgery import (
    Damped,
    DoubledConv,
    LowRankUpdate,
    Reversed,
    ShiftedNorm,
    SteepSiLU,
    fuse_in_eval,
    legacy_weight_norm,
    like,
    norm_like,
    parametrize_all,
    patch_forward,
    quantization_aware,
    set_item,
)

Change = Callable[[nn.Module], object]


# name: (change to one MBConv with expansion and residual, whether the logits must move)
BLOCK_CHANGES: dict[str, tuple[Change, bool]] = {
    "activation_hardswish": (lambda b: set_item(b.block[0], 2, nn.Hardswish()), True),
    "activation_relu6": (lambda b: set_item(b.block[1], 2, nn.ReLU6(inplace=True)), True),
    "activation_not_in_place": (lambda b: set_item(b.block[1], 2, nn.SiLU()), False),
    "activation_subclass": (lambda b: set_item(b.block[0], 2, SteepSiLU()), True),
    "activation_removed": (lambda b: b.block[1].pop(2), True),
    "activation_appended": (lambda b: b.block[3].append(nn.Hardtanh()), True),
    "dropout_appended": (lambda b: b.block[1].append(nn.Dropout2d(0.5)), False),
    "se_identity": (lambda b: set_item(b.block, 2, nn.Identity()), True),
    "se_deleted": (lambda b: b.block.pop(2), True),
    "se_twice": (lambda b: b.block.insert(2, b.block[2]), True),
    "se_relu": (lambda b: setattr(b.block[2], "activation", nn.ReLU(inplace=True)), True),
    "se_hardsigmoid": (lambda b: setattr(b.block[2], "scale_activation", nn.Hardsigmoid()), True),
    "se_max_pool": (lambda b: setattr(b.block[2], "avgpool", nn.AdaptiveMaxPool2d(1)), True),
    "se_without_bias": (lambda b: setattr(b.block[2].fc1, "bias", None), False),
    "se_wider": (
        lambda b: (
            setattr(b.block[2], "fc1", like(b.block[2].fc1, out_channels=5, bias=True)),
            setattr(b.block[2], "fc2", like(b.block[2].fc2, in_channels=5, bias=True)),
        ),
        True,
    ),
    "depthwise_dilated": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], padding=4, dilation=2)),
        True,
    ),
    "depthwise_larger": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], kernel_size=7, padding=3)),
        True,
    ),
    "depthwise_rectangular": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], kernel_size=(3, 5), padding=(1, 2))),
        True,
    ),
    "depthwise_even_kernel": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], kernel_size=4, padding="same")),
        True,
    ),
    "depthwise_circular": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], padding_mode="circular")),
        True,
    ),
    "depthwise_grouped": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], groups=b.block[1][0].groups // 2)),
        True,
    ),
    "depthwise_subclass": (
        lambda b: set_item(b.block[1], 0, like(b.block[1][0], kind=DoubledConv)),
        True,
    ),
    "expand_3x3": (
        lambda b: set_item(b.block[0], 0, like(b.block[0][0], kernel_size=3, padding=1)),
        True,
    ),
    "expand_grouped": (
        lambda b: set_item(b.block[0], 0, like(b.block[0][0], groups=2)),
        True,
    ),
    "project_adapter": (
        lambda b: set_item(b.block[3], 0, LowRankUpdate(b.block[3][0])),
        True,
    ),
    "expand_without_activation": (lambda b: b.block[0].__delitem__(2), True),
    "norm_identity": (lambda b: set_item(b.block[0], 1, nn.Identity()), True),
    "norm_group": (
        lambda b: set_item(b.block[1], 1, nn.GroupNorm(4, b.block[1][1].num_features)),
        True,
    ),
    "norm_subclass": (
        lambda b: set_item(b.block[1], 1, norm_like(b.block[1][1], ShiftedNorm)),
        True,
    ),
    "norm_eps": (lambda b: setattr(b.block[1][1], "eps", 0.5), True),
    "conv_patched": (lambda b: patch_forward(b.block[1][0], 1.5), True),
    "norm_patched": (lambda b: patch_forward(b.block[0][1], 1.5), True),
    "se_patched": (lambda b: patch_forward(b.block[2], 1.5), True),
    "layer_patched": (lambda b: patch_forward(b.block[1], 1.5), True),
    "body_patched": (lambda b: patch_forward(b.block, 1.5), True),
    "block_patched": (lambda b: patch_forward(b, 1.5), True),
    "body_subclass": (lambda b: setattr(b, "block", Reversed(*b.block)), True),
    "body_longer": (lambda b: b.block.append(nn.AvgPool2d(3, 1, 1)), True),
    "body_identity": (lambda b: setattr(b, "block", nn.Identity()), True),
    "drop_path_identity": (lambda b: setattr(b, "stochastic_depth", nn.Identity()), False),
    "drop_path_per_batch": (lambda b: setattr(b.stochastic_depth, "mode", "batch"), False),
    "drop_path_scaling": (lambda b: setattr(b, "stochastic_depth", nn.Softsign()), True),
    "no_residual": (lambda b: setattr(b, "use_res_connect", False), True),
    "fused_expand": (lambda b: fuse_in_eval(b.block[0]), False),
    "fused_depthwise": (lambda b: fuse_in_eval(b.block[1]), False),
    "fused_project": (lambda b: fuse_in_eval(b.block[3]), False),
    "parametrized_expand": (lambda b: parametrize_all(b.block[0]), True),
    "parametrized_depthwise": (lambda b: parametrize_all(b.block[1]), True),
    "parametrized_project": (lambda b: parametrize_all(b.block[3]), True),
    "parametrized_se": (
        lambda b: parametrize.register_parametrization(b.block[2].fc2, "weight", Damped()),
        True,
    ),
    "weight_norm": (lambda b: parametrizations.weight_norm(b.block[3][0]), False),
    "weight_norm_by_hook": (lambda b: legacy_weight_norm(b.block[1][0]), False),
    "spectral_norm": (lambda b: parametrizations.spectral_norm(b.block[0][0]), True),
    "pruned_depthwise": (lambda b: prune.l1_unstructured(b.block[1][0], "weight", 0.3), True),
    "pruned_project": (
        lambda b: prune.ln_structured(b.block[3][0], "weight", 0.5, n=2, dim=0),
        True,
    ),
    "pruned_se": (lambda b: prune.l1_unstructured(b.block[2].fc1, "weight", 0.5), True),
    "pruned_for_good": (
        lambda b: prune.remove(prune.l1_unstructured(b.block[0][0], "weight", 0.5), "weight"),
        True,
    ),
    "quantization_aware": (lambda b: quantization_aware(b.block[0]), True),
    "weight_replaced": (
        lambda b: setattr(b.block[2].fc1, "weight", nn.Parameter(b.block[2].fc1.weight * 2)),
        True,
    ),
}


@pytest.fixture(scope="module")
def unchanged() -> Tensor:
    """Output of our network in eval mode as it was."""
    return output(pair())


def output(models: Pair) -> Tensor:
    return networks.run_network(models.actual, random_images(4, 48), backward=False)["y"]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCK_CHANGES)
def test_changed_block(name: str, training: bool, unchanged: Tensor) -> None:
    change, moves = BLOCK_CHANGES[name]
    models = pair()
    with torch.no_grad():
        models.actual(random_images(1, 48))  # whatever is cached is cached now
    models.train(training).apply(lambda model: change(model.features[5][1]))
    y = models.assert_alike(random_images(4, 48))["y"]
    if moves and not training:  # in training a norm may undo what scales its input
        assert not torch.allclose(y, unchanged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "change",
    [
        lambda b: set_item(b.block[0], 2, nn.Hardswish()),
        lambda b: set_item(b.block, 1, nn.Identity()),
        lambda b: fuse_in_eval(b.block[0]),
        lambda b: parametrize_all(b.block[2]),
        lambda b: set_item(b.block[0], 0, like(b.block[0][0], dilation=2, padding=2)),
    ],
    ids=["hardswish", "se_identity", "fused", "parametrized", "dilated"],
)
def test_changed_block_without_expansion(change: Change, training: bool) -> None:
    models = pair().train(training)
    models.apply(lambda model: change(model.features[1][0]))
    models.assert_alike(random_images(4, 48))


# name: change to the whole network
NETWORK_CHANGES: dict[str, Change] = {
    "classifier": lambda m: set_item(m.classifier, 1, nn.Linear(m.classifier[1].in_features, 5)),
    "classifier_deeper": lambda m: setattr(
        m, "classifier", nn.Sequential(nn.Linear(m.classifier[1].in_features, 9), nn.ReLU())
    ),
    "classifier_identity": lambda m: setattr(m, "classifier", nn.Identity()),
    "stem": lambda m: set_item(m.features[0], 0, nn.Conv2d(3, 8, 7, 2, 3, bias=False)),
    "stem_stride_1": lambda m: setattr(m.features[0][0], "stride", (1, 1)),
    "stem_activation": lambda m: set_item(m.features[0], 2, nn.GELU()),
    "head_removed": lambda m: (
        setattr(m, "features", m.features[:-1]),
        setattr(m, "classifier", nn.Linear(80, 5)),
    ),
    "stage_removed": lambda m: m.features[5].pop(1),
    "stage_identity": lambda m: set_item(m.features, 1, nn.Identity()),
    "block_replaced": lambda m: set_item(m.features[5], 1, nn.Conv2d(32, 32, 3, 1, 1)),
    "pooling": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "all_activations": lambda m: [
        setattr(parent, name, nn.Hardswish())
        for parent in m.modules()
        for name, child in list(parent.named_children())
        if type(child) is nn.SiLU
    ],
    "all_parametrized": lambda m: [
        parametrize.register_parametrization(conv, "weight", Damped())
        for conv in [c for c in m.modules() if type(c) is nn.Conv2d]
    ],
    "all_pruned": lambda m: prune.global_unstructured(
        [(c, "weight") for c in m.modules() if type(c) is nn.Conv2d],
        pruning_method=prune.L1Unstructured,
        amount=0.1,
    ),
    "block_shared": lambda m: m.features[5].append(m.features[5][1]),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORK_CHANGES)
def test_changed_network(name: str, training: bool) -> None:
    models = pair().train(training).apply(NETWORK_CHANGES[name])
    models.assert_alike(random_images(4, 48))


def test_all_fused_for_inference() -> None:
    def fuse(model: nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__ == "Conv2dNormActivation":
                fuse_in_eval(module)

    models = pair()
    before = output(models)
    y = models.apply(fuse).assert_alike(random_images(4, 48))["y"]
    torch.testing.assert_close(y, before, rtol=1e-3, atol=1e-3)


def test_slices_and_children() -> None:
    models = pair()
    x = random_images(2, 48)

    def pieces(model: nn.Module) -> list[nn.Module]:
        features = model.features
        return [
            features[:4],
            nn.Sequential(*features[0].children(), *features[1].children()),
            nn.Sequential(*list(model.children())[:-1], nn.Flatten()),
            nn.Sequential(features[:5], features[5][:1]),
            nn.Sequential(*features[0], *(block for stage in features[1:6] for block in stage)),
        ]

    with torch.no_grad():
        for ours, theirs in zip(*map(pieces, models.models), strict=True):
            networks.assert_alike({"y": ours(x)}, {"y": theirs(x)})
    assert models.actual.features[:4][1][0] is models.actual.features[1][0]
    assert models.actual.features[-1] is models.actual.features[8]
    assert len(list(models.actual.features.children())) == 9


def test_blocks_run_alone_in_any_layout() -> None:
    models = pair()
    for index, channels in ((1, 8), (3, 8), (5, 24)):
        x = torch.randn(2, channels, 11, 9)
        for layout in (torch.contiguous_format, torch.channels_last):
            image = x.to(memory_format=layout)
            with torch.no_grad():
                networks.assert_alike(*({"y": m.features[index](image)} for m in models.models))


def test_convert_sync_batchnorm() -> None:
    """The converted network has SyncBatchNorm at torchvision's paths and gives its outputs."""
    models = pair()
    before = output(models)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted = [convert(model) for model in models.models]
    kinds = [{p: type(c).__name__ for p, c in m.named_modules()} for m in converted]
    assert kinds[0] == kinds[1]
    assert sum(kind == "SyncBatchNorm" for kind in kinds[0].values()) == 31
    assert sum(kind == "SiLU" for kind in kinds[0].values()) == 21 + 10
    models = Pair(*converted)
    y = models.assert_alike(random_images(4, 48))["y"]
    torch.testing.assert_close(y, before, rtol=1e-3, atol=1e-3)


def test_sync_batchnorm_trains_without_a_process_group() -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    models = pair()
    models = Pair(*(convert(model) for model in models.models))
    models.train().assert_alike(random_images(4, 48))


def test_dynamic_quantization_of_the_classifier() -> None:
    models = pair()
    quantize = functools.partial(
        quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = quantize(models.actual), quantize(models.stock)
    x = random_images(2, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)


def _set_weight(weight: Tensor) -> Callable[[nn.Conv2d], None]:
    return lambda conv: setattr(conv, "weight", nn.Parameter(weight))


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [
        ("block.1.0", _set_weight(torch.zeros(192, 1, 5, 3)), r"block\.1\.0\.weight has shape"),
        ("block.1.0", _set_weight(torch.zeros(8, 1, 5, 5)), r"block\.1\.0\.weight has shape"),
        ("block.3.0", _set_weight(torch.zeros(99, 192, 1, 1)), r"block\.3\.0\.weight has shape"),
        (
            "block.2.fc1",
            lambda conv: setattr(conv, "bias", nn.Parameter(torch.zeros(1))),
            r"block\.2\.fc1\.bias has shape",
        ),
    ],
)
def test_parameters_of_another_shape_are_not_read(
    path: str, change: Callable[[nn.Module], None], reason: str
) -> None:
    block = pair().actual.features[5][1]
    change(block.get_submodule(path))
    assert re.search(reason, explain(block) or "fused")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_parameters_of_another_dtype_go_to_stock(dtype: torch.dtype) -> None:
    """Stock refuses a mixture of dtypes; read as fp32 they would give wrong numbers."""
    models = pair()
    for model in models.models:
        model.features[5][1].block[2].to(dtype)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="type"):
            model(random_images(1, 48))


def test_statistics_on_another_device_go_to_stock() -> None:
    model = pair().actual.train()
    model.features[5][1].block[1][1].running_mean = torch.zeros(192, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(random_images(2, 48))


@pytest.mark.parametrize("change", [{"p": 1.5}, {"p": -0.5}, {"p": None}, {"mode": "column"}])
def test_what_drop_path_refuses_is_refused_in_eval_too(change: dict[str, object]) -> None:
    models, x = pair(), random_images(1, 48)
    block = next(b for b in models.actual.features.modules() if getattr(b, "use_res_connect", 0))
    with torch.no_grad():
        models.actual(x)
        vars(block.stochastic_depth).update(change)
        with pytest.raises((TypeError, ValueError)):
            models.actual(x)
