"""The published EfficientNets as data, and the widths and depths that follow from it.

Sources: Tan & Le (arXiv 1905.11946), table 1 for B0; width, depth, resolution and dropout of
B1-B8 and L2 from https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet;
BN constants and preprocessing of B0-B7 from torchvision 0.28's IMAGENET1K_V1 weights, those of B8
and L2 as TensorFlow has them (a centre crop that leaves a border of 32 pixels). Lite0 to Lite4
are TensorFlow's in everything, with its padding and BN constants:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. V2: Tan & Le (arXiv
2104.00298), table 4 for S; all of S, M and L from torchvision 0.28.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from effnet_fast.modules.layers import MBConvConfig
from effnet_fast.modules.widths import round_channels
from effnet_fast.reference.activations import check_activation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
HEAD_RATIO = 4  # channels of the head over those of the last stage
MBCONV, FUSED = "mbconv", "fused"  # kinds of blocks: MBConv and FusedMBConv
KINDS = (MBCONV, FUSED)
PADDINGS = ("symmetric", "same")


@dataclass(frozen=True)
class Stage:
    """One row of the network's table: `repeats` blocks, of which the first may stride.

    Args:
        expand_ratio: expanded channels over input channels.
        kernel: K of the convolution that looks at neighbours.
        stride: of the first block; that of the others is 1.
        in_channels, out_channels: of the stage.
        repeats: number of blocks.
        kind: one of KINDS.

    Raises:
        ValueError: an unknown kind.
    """

    expand_ratio: int
    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    repeats: int
    kind: str = MBCONV

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


B0_STAGES = (
    Stage(1, 3, 1, 32, 16, 1),
    Stage(6, 3, 2, 16, 24, 2),
    Stage(6, 5, 2, 24, 40, 2),
    Stage(6, 3, 2, 40, 80, 3),
    Stage(6, 5, 1, 80, 112, 3),
    Stage(6, 5, 2, 112, 192, 4),
    Stage(6, 3, 1, 192, 320, 1),
)
V2_S_STAGES = (
    Stage(1, 3, 1, 24, 24, 2, FUSED),
    Stage(4, 3, 2, 24, 48, 4, FUSED),
    Stage(4, 3, 2, 48, 64, 4, FUSED),
    Stage(4, 3, 2, 64, 128, 6),
    Stage(6, 3, 1, 128, 160, 9),
    Stage(6, 3, 2, 160, 256, 15),
)
V2_M_STAGES = (
    Stage(1, 3, 1, 24, 24, 3, FUSED),
    Stage(4, 3, 2, 24, 48, 5, FUSED),
    Stage(4, 3, 2, 48, 80, 5, FUSED),
    Stage(4, 3, 2, 80, 160, 7),
    Stage(6, 3, 1, 160, 176, 14),
    Stage(6, 3, 2, 176, 304, 18),
    Stage(6, 3, 1, 304, 512, 5),
)
V2_L_STAGES = (
    Stage(1, 3, 1, 32, 32, 4, FUSED),
    Stage(4, 3, 2, 32, 64, 7, FUSED),
    Stage(4, 3, 2, 64, 96, 7, FUSED),
    Stage(4, 3, 2, 96, 192, 10),
    Stage(6, 3, 1, 192, 224, 19),
    Stage(6, 3, 2, 224, 384, 25),
    Stage(6, 3, 1, 384, 640, 7),
)
V2_HEAD = 1280


@dataclass(frozen=True)
class Variant:
    """One published network.

    Args:
        name: a key of VARIANTS, "custom" for a network of one's own.
        width, depth: multipliers of the baseline's channels and repeats.
        resolution: side of the training images, pixels; of V2's evaluation images.
        dropout: drop probability before the classifier.
        bn_eps, bn_momentum: BatchNorm2d's constants.
        resize, crop: side after resizing and of the centre crop for evaluation, pixels.
        interpolation: how evaluation images are resized.
        baseline: the table whose widths and repeats are multiplied.
        padding: of the convolutions that stride: "symmetric", (K-1)//2 on both sides, or "same" as
            in TensorFlow.
        mean, std: of each channel of the training images over [0, 1], red green blue.
        activation: of every layer that has one, as in `MBConvConfig`.
        squeeze: whether its MBConv blocks have squeeze-and-excitation.
        fixed_ends: whether the stem's channels and the repeats of the first and the last stage are
            the baseline's, whatever the multipliers.
        head: channels before the classifier; None means HEAD_RATIO times those of the last stage.
        padded_as: with padding "same", the side of images whose padding images of every size get,
            as in networks that fix it when they are built; None: each image gets its own.
        squash: whether evaluation images are resized to squares, whatever their shape.
        expand_bn_momentum: of the expansions' BatchNorms alone; None means bn_momentum.

    Raises:
        ValueError: an unknown padding or activation, or a padded_as below 1.
    """

    name: str
    width: float
    depth: float
    resolution: int
    dropout: float
    bn_eps: float
    bn_momentum: float
    resize: int
    crop: int
    interpolation: str
    baseline: tuple[Stage, ...] = B0_STAGES
    padding: str = "symmetric"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    activation: str = "silu"
    squeeze: bool = True
    fixed_ends: bool = False
    head: int | None = None
    padded_as: int | None = None
    squash: bool = False
    expand_bn_momentum: float | None = None

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")
        if self.padded_as is not None and self.padded_as < 1:
            raise ValueError(f"padded_as must be at least 1, got {self.padded_as}")
        check_activation("activation", self.activation)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The baseline's stages with widths and repeats scaled."""
        scaled = [
            replace(
                stage,
                in_channels=round_channels(stage.in_channels * self.width),
                out_channels=round_channels(stage.out_channels * self.width),
                repeats=math.ceil(stage.repeats * self.depth),
            )
            for stage in self.baseline
        ]
        if self.fixed_ends:
            first, last = self.baseline[0], self.baseline[-1]
            scaled[-1] = replace(scaled[-1], repeats=last.repeats)
            scaled[0] = replace(scaled[0], in_channels=first.in_channels, repeats=first.repeats)
        return tuple(scaled)

    def block_configs(self, stage: Stage) -> Iterator[MBConvConfig]:
        """The geometry of each block of one of `stages`; those after the first are alike."""
        padding = self.padding_of(stage)
        for repeat in range(stage.repeats):
            yield MBConvConfig(
                expand_ratio=stage.expand_ratio,
                kernel=stage.kernel,
                stride=stage.stride if repeat == 0 else 1,
                input_channels=stage.in_channels if repeat == 0 else stage.out_channels,
                out_channels=stage.out_channels,
                padding=padding,
                activation=self.activation,
                squeeze=self.squeeze and stage.kind == MBCONV,
            )

    def padding_of(self, stage: Stage | None) -> str:
        """The padding of the stem (None), or of a stage's first block, as `MBConvConfig` has it."""
        side = self.padded_as
        if side is None or self.padding != "same":
            return self.padding
        if stage is not None:
            side = (side + 1) // 2  # behind the stem
            for before in self.stages:
                if before is stage:
                    break
                side = -(-side // before.stride)
        return "symmetric" if side % 2 else "even"

    @property
    def stem_channels(self) -> int:
        """Channels after the first convolution."""
        return self.stages[0].in_channels

    @property
    def head_channels(self) -> int:
        """Channels before the classifier."""
        return self.head or HEAD_RATIO * self.stages[-1].out_channels

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(stage.repeats for stage in self.stages)

    @property
    def has_fused(self) -> bool:
        """Whether a stage consists of FusedMBConv, as V2's first three do."""
        return any(stage.kind == FUSED for stage in self.baseline)


_LITE: dict[str, Any] = {
    "padding": "same",
    "mean": LITE_MEAN,
    "std": LITE_STD,
    "activation": "relu6",
    "squeeze": False,
    "fixed_ends": True,
    "head": 1280,
}
_ROWS = (
    #       name  width depth  res. drop  eps   mom. resize crop interpolation
    Variant("b0", 1.0, 1.0, 224, 0.2, 1e-5, 0.1, 256, 224, "bicubic"),
    Variant("b1", 1.0, 1.1, 240, 0.2, 1e-5, 0.1, 256, 240, "bicubic"),
    Variant("b2", 1.1, 1.2, 260, 0.3, 1e-5, 0.1, 288, 288, "bicubic"),
    Variant("b3", 1.2, 1.4, 300, 0.3, 1e-5, 0.1, 320, 300, "bicubic"),
    Variant("b4", 1.4, 1.8, 380, 0.4, 1e-5, 0.1, 384, 380, "bicubic"),
    Variant("b5", 1.6, 2.2, 456, 0.4, 1e-3, 0.01, 456, 456, "bicubic"),
    Variant("b6", 1.8, 2.6, 528, 0.5, 1e-3, 0.01, 528, 528, "bicubic"),
    Variant("b7", 2.0, 3.1, 600, 0.5, 1e-3, 0.01, 600, 600, "bicubic"),
    Variant("b8", 2.2, 3.6, 672, 0.5, 1e-3, 0.01, 704, 672, "bicubic"),
    Variant("l2", 4.3, 5.3, 800, 0.5, 1e-3, 0.01, 832, 800, "bicubic"),
    Variant("lite0", 1.0, 1.0, 224, 0.2, 1e-3, 0.01, 256, 224, "bicubic", **_LITE),
    Variant("lite1", 1.0, 1.1, 240, 0.2, 1e-3, 0.01, 272, 240, "bicubic", **_LITE),
    Variant("lite2", 1.1, 1.2, 260, 0.3, 1e-3, 0.01, 292, 260, "bicubic", **_LITE),
    Variant("lite3", 1.2, 1.4, 280, 0.3, 1e-3, 0.01, 312, 280, "bicubic", **_LITE),
    Variant("lite4", 1.4, 1.8, 300, 0.3, 1e-3, 0.01, 332, 300, "bicubic", **_LITE),
)


def _v2(
    size: str, stages: tuple[Stage, ...], side: int, dropout: float, interpolation: str
) -> Variant:
    """A V2: evaluation images are not cropped, and its table is not scaled."""
    row = (f"v2_{size}", 1.0, 1.0, side, dropout, 1e-3, 0.1, side, side, interpolation)
    return Variant(*row, baseline=stages, head=V2_HEAD)


_V2_ROWS = (
    _v2("s", V2_S_STAGES, 384, 0.2, "bilinear"),
    _v2("m", V2_M_STAGES, 480, 0.3, "bilinear"),
    replace(_v2("l", V2_L_STAGES, 480, 0.4, "bicubic"), mean=(0.5,) * 3, std=(0.5,) * 3),
)
VARIANTS = MappingProxyType({variant.name: variant for variant in (*_ROWS, *_V2_ROWS)})


def custom_variant(
    *,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: int = 224,
    stages: tuple[Stage, ...] = B0_STAGES,
    dropout: float = 0.2,
) -> Variant:
    """A network of any size, with B0's constants and preprocessing (a crop of 224 from 256).

    Args:
        depth, width: multipliers of the repeats and channels of `stages`.
        resolution: side of the images, pixels.
        stages: the baseline's table; each stage takes the output channels of the stage before.
        dropout: drop probability before the classifier.

    Raises:
        ValueError: a multiplier that is not positive and finite, a resolution below 1, no stages,
            a stage without blocks, or stages that do not fit together.
    """
    for name, value in (("depth", depth), ("width", width)):
        if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    if isinstance(resolution, bool) or not isinstance(resolution, Integral) or resolution < 1:
        raise ValueError(f"resolution must be an int of at least 1, got {resolution!r}")
    stages = tuple(stages)
    if not stages:
        raise ValueError("stages must hold at least one stage")
    for stage in stages:
        if stage.repeats < 1:
            raise ValueError(f"repeats of a stage must be at least 1, got {stage.repeats!r}")
    for before, after in itertools.pairwise(stages):
        if before.out_channels != after.in_channels:
            raise ValueError(
                f"a stage of {before.out_channels} output channels is followed by one of "
                f"{after.in_channels} input channels"
            )
    resolution = int(resolution)
    resize = round(resolution * 256 / 224)
    return Variant(
        "custom",
        width,
        depth,
        resolution,
        dropout,
        1e-5,
        0.1,
        resize,
        resolution,
        "bicubic",
        stages,
    )
