"""EfficientNet: the network built from a variant's table.

Source: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv 1905.11946); module tree, initialisation and order of random draws as torchvision 0.28.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.layers import Conv2dNormActivation, MBConv, MBConvConfig
from effnet_fast.models.loading import load_network
from effnet_fast.models.variants import VARIANTS, Variant
from effnet_fast.ops import scratch

if TYPE_CHECKING:
    from typing_extensions import Self

MEMORY_MODES = ("fast", "lean")


class EfficientNet(nn.Module):
    """EfficientNet, x [N,in_chans,H,W] -> logits [N,num_classes].

    Children: `features` (stem, seven stages of MBConv, head), `avgpool`, `classifier`. A
    contiguous NCHW input is converted to channels_last once, before the stem.

    Args:
        variant: row of `VARIANTS`, or its name.
        num_classes: size of the logits.
        dropout: drop probability before the classifier; None means the variant's.
        stochastic_depth_prob: p of the drop-path, growing linearly from 0 at the first block
            towards p after the last.
        norm_layer: makes a normalisation from its channels; None means BatchNorm2d with the
            variant's constants.
        in_chans: channels of the input images.
        backend: what computes the fused ops, as in `use_backend`; "auto" leaves the choice to
            the context, "reference" is stock PyTorch. May be changed later as `model.backend`.
        memory: "fast", or "lean" to save less for backward and compute it again.

    Raises:
        ValueError: an argument outside what is allowed.
        TypeError: a norm_layer that cannot be called.
    """

    def __init__(
        self,
        variant: Variant | str,
        *,
        num_classes: int = 1000,
        dropout: float | None = None,
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        backend: str = "auto",
        memory: str = "fast",
    ) -> None:
        super().__init__()
        variant = _find_variant(variant)
        dropout = variant.dropout if dropout is None else dropout
        _check_counts(num_classes=num_classes, in_chans=in_chans)
        _check_probabilities(dropout=dropout, stochastic_depth_prob=stochastic_depth_prob)
        _check_choices(backend, memory)
        if norm_layer is None:
            norm_layer = _default_norm(variant)
        elif not callable(norm_layer):
            raise TypeError(
                "norm_layer must make a module from a number of channels, or be None, "
                f"got {type(norm_layer).__name__}"
            )
        self.variant = variant
        self.backend = backend
        self.memory = memory

        conv = partial(Conv2dNormActivation, norm_layer=norm_layer, activation_layer=nn.SiLU)
        self.features = nn.Sequential(
            conv(
                in_chans,
                variant.stem_channels,
                kernel_size=3,
                stride=2,
                padding="same" if variant.padding == "same" else None,
            ),
            *_stages(variant, stochastic_depth_prob, norm_layer),
            conv(variant.stages[-1].out_channels, variant.head_channels, kernel_size=1),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(p=dropout, inplace=True),
            nn.Linear(variant.head_channels, num_classes),
        )
        for module in self.modules():
            _init_parameters(module)

    @classmethod
    def from_checkpoint(
        cls,
        path_or_url: str | os.PathLike[str],
        *,
        family: str = "auto",
        variant: Variant | str | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        ema: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> Self:
        """The network that a checkpoint of any family is of, with its weights, in training mode.

        Padding, BN constants and preprocessing (`model.variant`) are the family's, so that logits
        are those of the family's own package.

        Args:
            path_or_url: as for `checkpoints.load`. The model keeps no hold on the file.
            family: "torchvision", "timm", "timm_tf", "lukemelas", "nvidia", or "auto": as the
                file's metadata and names tell. What cannot be told from them, timm's plain from
                its tf_ networks, is told from the name of the file or of the model in it; where
                that says nothing, plain is assumed with a warning.
            variant: a published size or a `Variant`; None finds the published size by the shapes.
            num_classes: 0 leaves the classifier out; None means as many as the file has.
            in_chans: channels of the images; a stem of another number is summed or repeated, see
                `adapt_input_channels`. None means as many as the file has.
            ema: whether to prefer the moving average of the weights in a training checkpoint.
            progress: shows a progress bar while downloading.
            options: as for `EfficientNet`.

        Raises:
            OSError, ValueError: as `checkpoints.load`, or the file's layers are not those of the
                variant; the first names and shapes that differ are given.
        """
        return load_network(
            cls,
            path_or_url,
            family=family,
            variant=variant,
            num_classes=num_classes,
            in_chans=in_chans,
            ema=ema,
            progress=progress,
            **options,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "auto":
            return self._logits(x)
        with backends.use_backend(self.backend):
            return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.avgpool(self._features(x))
        return self.classifier(torch.flatten(x, 1))

    def _features(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.features(x)
        with scratch.scope():
            return self.features(x)


def _stages(
    variant: Variant, stochastic_depth_prob: float, norm_layer: Callable[..., nn.Module]
) -> Iterator[nn.Sequential]:
    """The seven stages; drop-path of block i of n is stochastic_depth_prob * i / n."""
    index = 0
    for stage in variant.stages:
        blocks = []
        for repeat in range(stage.repeats):
            config = MBConvConfig(
                expand_ratio=stage.expand_ratio,
                kernel=stage.kernel,
                stride=stage.stride if repeat == 0 else 1,
                input_channels=stage.in_channels if repeat == 0 else stage.out_channels,
                out_channels=stage.out_channels,
                padding=variant.padding,
            )
            prob = stochastic_depth_prob * float(index) / variant.blocks
            blocks.append(MBConv(config, prob, norm_layer))
            index += 1
        yield nn.Sequential(*blocks)


def _init_parameters(module: nn.Module) -> None:
    """torchvision's initialisation, which does not divide a depthwise fan-out by the groups."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        if module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        limit = 1.0 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -limit, limit)
        nn.init.zeros_(module.bias)


def _default_norm(variant: Variant) -> Callable[..., nn.Module]:
    return partial(nn.BatchNorm2d, eps=variant.bn_eps, momentum=variant.bn_momentum)


def _find_variant(variant: Variant | str) -> Variant:
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {count!r}")


def _check_probabilities(**probabilities: float) -> None:
    for name, probability in probabilities.items():
        if not isinstance(probability, (int, float)) or not 0.0 <= probability <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {probability!r}")


def _check_choices(backend: str, memory: str) -> None:
    if not isinstance(backend, str):
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}, got {backend!r}")
    backends.parse(backend)
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}, got {memory!r}")
