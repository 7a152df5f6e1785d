"""The packages whose checkpoints are read: their own networks, carrying calibrated weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_fast import checkpoints
from effnet_fast.checkpoints import Checkpoint
from effnet_fast.models import VARIANTS, Variant
from effnet_fast.models.loading import family_variant
from networks import calibrated_state


def _torchvision(size: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, f"efficientnet_{size}")()


def _timm(size: str) -> nn.Module:
    import timm

    return timm.create_model(f"efficientnet_{size}")


def _timm_tf(size: str) -> nn.Module:
    import timm

    return timm.create_model(f"tf_efficientnet_{size}")


def _lukemelas(size: str) -> nn.Module:
    if size.startswith("lite"):
        from efficientnet_lite_pytorch import EfficientNet
    else:
        from efficientnet_pytorch import EfficientNet

    # Without an image size padding follows the input; with one it is that of the size given.
    return EfficientNet.from_name(f"efficientnet-{size}", image_size=None)


class _NvidiaBlock(nn.Module):
    """Names and shapes of NVIDIA's MBConvBlock alone; it computes nothing."""

    def __init__(self, ratio: int, kernel: int, c_in: int, c_out: int) -> None:
        super().__init__()
        expanded = ratio * c_in
        self.expand = _nvidia_conv(c_in, expanded, 1) if ratio != 1 else None
        self.depsep = _nvidia_conv(expanded, expanded, kernel, expanded)
        self.se = nn.Module()
        self.se.squeeze = nn.Linear(expanded, max(1, c_in // 4))
        self.se.expand = nn.Linear(max(1, c_in // 4), expanded)
        self.proj = _nvidia_conv(expanded, c_out, 1)


def _nvidia_conv(c_in: int, c_out: int, kernel: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out)))


def _nvidia(size: str) -> nn.Module:
    """The modules of DeepLearningExamples' network, which is in no package.

    Source: PyTorch/Classification/ConvNets/image_classification/models/efficientnet.py.
    """
    variant = VARIANTS[size]
    layers = []
    for stage in variant.stages:
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(stage.repeats):
            c_in = stage.out_channels if i else stage.in_channels
            blocks[f"block{i}"] = _NvidiaBlock(
                stage.expand_ratio, stage.kernel, c_in, stage.out_channels
            )
        layers.append(nn.Sequential(blocks))
    model = nn.Module()
    model.stem = _nvidia_conv(3, variant.stem_channels, 3)
    model.layers = nn.Sequential(*layers)
    model.features = _nvidia_conv(variant.stages[-1].out_channels, variant.head_channels, 1)
    model.classifier = nn.Sequential(OrderedDict(fc=nn.Linear(variant.head_channels, 1000)))
    return model


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "timm_tf": _timm_tf,
    "lukemelas": _lukemelas,
    "nvidia": _nvidia,
}
RUNNABLE = tuple(family for family in BUILDERS if family != "nvidia")


def skeleton(family: str, size: str) -> nn.Module:
    """The family's own network without memory behind it, in eval mode."""
    with torch.device("meta"):
        return BUILDERS[family](size).eval()


def variant_of(family: str, size: str) -> Variant:
    return family_variant(VARIANTS[size], Checkpoint({}, family, family))


def state_of(family: str, size: str, resolution: int) -> dict[str, Tensor]:
    """Calibrated weights, with the family's padding and eps, under torchvision's names."""
    return calibrated_state(variant_of(family, size), resolution)


def peer(family: str, size: str, state: dict[str, Tensor]) -> nn.Module:
    """The family's own network, carrying a copy of a torchvision-named state."""
    model = skeleton(family, size)
    named = checkpoints.convert({key: value.clone() for key, value in state.items()}, family)
    model.load_state_dict(named, strict=True, assign=True)
    return model
