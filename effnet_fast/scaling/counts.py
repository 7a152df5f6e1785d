"""Exact counts of a network from its table: parameters, multiply-adds, activations.

A multiply-add (MAC) is one multiplication and one addition. The literature on EfficientNet calls
the number of MAC "FLOPs"; here FLOPs are twice the MAC, as everywhere else.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from effnet_fast.models.variants import B0_STAGES, HEAD_RATIO, Stage, Variant
from effnet_fast.modules.layers import MBConvConfig
from effnet_fast.scaling.checks import whole


class ConvShape(NamedTuple):
    """Equal convolutions of a stage (the classifier counts as a 1x1 one).

    Args:
        stage: 0 for the stem, 1 to n for the stages of blocks, n + 1 for head and classifier.
        kind: "stem", "expand", "depthwise", "reduce", "excite", "project", "head", "classifier".
        in_channels, out_channels: channels of its input and output.
        kernel, stride: K of the square kernel, and its stride.
        groups: groups of the convolution.
        side: side of its square output, pixels.
        bias, norm: whether it has a bias, whether a BatchNorm follows.
        repeats: how many of them there are.
    """

    stage: int
    kind: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    side: int
    bias: bool
    norm: bool
    repeats: int

    @property
    def parameters(self) -> int:
        """Trained parameters of one: weight, bias, and the BatchNorm's weight and bias."""
        weight = self.out_channels * (self.in_channels // self.groups) * self.kernel**2
        return weight + self.out_channels * (self.bias + 2 * self.norm)

    @property
    def macs(self) -> int:
        """Multiply-adds of one for one image; taps that fall on the padding count."""
        return self.activations * (self.in_channels // self.groups) * self.kernel**2

    @property
    def activations(self) -> int:
        """Elements of the output of one for one image."""
        return self.out_channels * self.side**2


@dataclass(frozen=True)
class Counts:
    """A network's counts for one image.

    Args:
        parameters: trained parameters.
        macs: multiply-adds of all convolutions and the classifier.
        activations: elements of all their outputs.
    """

    parameters: int
    macs: int
    activations: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add."""
        return 2 * self.macs


def convolutions(
    variant: Variant,
    resolution: int | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Iterator[ConvShape]:
    """All convolutions of a network in order, the equal blocks of a stage together.

    Args:
        variant: the network.
        resolution: side of the square images, pixels; None means the variant's.
        num_classes: size of the logits.
        in_chans: channels of the images.

    Raises:
        ValueError: one of the three is no int of at least 1.
    """
    side = variant.resolution if resolution is None else resolution
    num_classes, in_chans = whole("num_classes", num_classes), whole("in_chans", in_chans)
    side = _output_side(whole("resolution", side), 2)
    stages = variant.stages
    stem = stages[0].in_channels
    yield ConvShape(0, "stem", in_chans, stem, 3, 2, 1, side, False, True, 1)
    for number, stage in enumerate(stages, 1):
        first, *later = itertools.islice(variant.block_configs(stage), 2)
        yield from _block(number, first, side, 1)
        side = _output_side(side, stage.stride)
        for config in later:
            yield from _block(number, config, side, stage.repeats - 1)
    last, head = len(stages) + 1, variant.head_channels
    channels = stages[-1].out_channels
    yield ConvShape(last, "head", channels, head, 1, 1, 1, side, False, True, 1)
    yield ConvShape(last, "classifier", head, num_classes, 1, 1, 1, 1, True, False, 1)


def _output_side(side: int, stride: int) -> int:
    """Of a convolution with an odd kernel K and (K-1)//2 of padding."""
    return -(-side // stride)


def _block(stage: int, config: MBConvConfig, side: int, repeats: int) -> Iterator[ConvShape]:
    inner, squeezed = config.expanded_channels, config.squeeze_channels
    out = _output_side(side, config.stride)
    rows = [
        ("depthwise", inner, inner, config.kernel, config.stride, inner, out, False, True),
        ("project", inner, config.out_channels, 1, 1, 1, out, False, True),
    ]
    if config.squeeze:
        rows[1:1] = [
            ("reduce", inner, squeezed, 1, 1, 1, 1, True, False),
            ("excite", squeezed, inner, 1, 1, 1, 1, True, False),
        ]
    if inner != config.input_channels:
        rows.insert(0, ("expand", config.input_channels, inner, 1, 1, 1, side, False, True))
    for row in rows:
        yield ConvShape(stage, *row, repeats)


def count(
    variant: Variant,
    resolution: int | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> Counts:
    """The counts of a network, without building it.

    Args:
        variant, resolution, num_classes, in_chans: as for `convolutions`.

    Raises:
        ValueError: as `convolutions`.
    """
    parameters = macs = activations = 0
    for conv in convolutions(variant, resolution, num_classes=num_classes, in_chans=in_chans):
        parameters += conv.repeats * conv.parameters
        macs += conv.repeats * conv.macs
        activations += conv.repeats * conv.activations
    return Counts(parameters, macs, activations)


def unrounded_macs(
    *,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: float = 224.0,
    stages: tuple[Stage, ...] = B0_STAGES,
    squeeze: bool = True,
    fixed_ends: bool = False,
    head: int | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> float:
    """Multiply-adds of one image if channels, repeats and sides could be any real numbers.

    Each stage's blocks count `depth` times, its channels `width` times; each stride halves the
    side. What depth, width and resolution then multiply is exact: 1x1 convolutions of the blocks
    grow with depth * width**2 * resolution**2, depthwise ones with width instead of width**2,
    squeeze-excite without the resolution, the stem and the head without the depth, the classifier
    with the width alone. So the whole grows less than depth * width**2 * resolution**2.

    Args:
        depth, width: multipliers of the repeats and channels of `stages`.
        resolution: side of the square images, pixels.
        stages, num_classes, in_chans: as for `custom_variant` and `count`.
        squeeze, fixed_ends, head: as for `Variant`; what is fixed is not multiplied.
    """
    side = resolution / 2
    channels = (1.0 if fixed_ends else width) * stages[0].in_channels
    total = 9 * in_chans * channels * side**2
    for number, stage in enumerate(stages):
        repeats = 1.0 if fixed_ends and number in (0, len(stages) - 1) else depth
        out = width * stage.out_channels
        for index in range(stage.repeats):
            inner = channels * stage.expand_ratio
            macs = channels * inner * side**2 if stage.expand_ratio != 1 else 0.0
            side /= 1 if index else stage.stride
            macs += inner * (stage.kernel**2 + out) * side**2
            macs += 2 * inner * channels / 4 if squeeze else 0.0
            total += repeats * macs
            channels = out
    width_of_head = HEAD_RATIO * channels if head is None else head
    return total + channels * width_of_head * side**2 + width_of_head * num_classes


class Group(NamedTuple):
    """Blocks that are alike, or the stem, or the head with the classifier.

    Args:
        stage: as in `ConvShape`.
        kind: "stem", "block" or "head".
        repeats: how many of them there are.
        convs: their convolutions by kind; the head's hold the classifier too.
        elements: for one image, of the input x, the depthwise convolution's input e (x where
            nothing expands) and output d, and the output y; the stem and the head have x and y.
        residual: whether x is added to y.
    """

    stage: int
    kind: str
    repeats: int
    convs: dict[str, ConvShape]
    elements: dict[str, int]
    residual: bool

    @property
    def expands(self) -> bool:
        """Whether there is a 1x1 convolution before the depthwise one."""
        return "expand" in self.convs

    @property
    def squeezes(self) -> bool:
        """Whether there is squeeze-and-excitation."""
        return "reduce" in self.convs

    @property
    def parameters(self) -> int:
        """Trained parameters of one."""
        return sum(conv.parameters for conv in self.convs.values())


def groups(
    variant: Variant,
    resolution: int | None = None,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
) -> tuple[Group, ...]:
    """The rows of `convolutions` gathered into blocks, with the sizes of their tensors.

    Args:
        variant, resolution, num_classes, in_chans: as for `convolutions`.

    Raises:
        ValueError: as `convolutions`.
    """
    return _groups(variant, resolution, num_classes, in_chans)


# One network is counted in several modes and plans, one after the other.
@functools.lru_cache(maxsize=8)
def _groups(
    variant: Variant, resolution: int | None, num_classes: int, in_chans: int
) -> tuple[Group, ...]:
    found = []
    x = in_chans * (variant.resolution if resolution is None else resolution) ** 2
    convs: dict[str, ConvShape] = {}
    for conv in convolutions(variant, resolution, num_classes=num_classes, in_chans=in_chans):
        convs[conv.kind] = conv
        if conv.kind not in ("stem", "project", "classifier"):
            continue
        first, last = next(iter(convs.values())), convs.get("head", conv)
        kind = first.kind if first.kind in ("stem", "head") else "block"
        y = last.activations
        sizes = {"x": x, "y": y}
        residual = False
        if kind == "block":
            depthwise = convs["depthwise"]
            sizes["e"] = convs["expand"].activations if "expand" in convs else x
            sizes["d"] = depthwise.activations
            residual = depthwise.stride == 1 and first.in_channels == last.out_channels
        found.append(Group(conv.stage, kind, conv.repeats, convs, sizes, residual))
        x, convs = y, {}
    return tuple(found)
