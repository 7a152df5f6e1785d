"""EfficientNet-B0 to B8, L2, Lite0 to Lite4 and V2-S to V2-L under torchvision's names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, overload

import torch
from torch import nn

from effnet_fast.models.efficientnet import EfficientNet, EfficientNetFeatures
from effnet_fast.models.feature_info import FeatureInfo, OutIndices
from effnet_fast.models.old_forms import takes_old_forms
from effnet_fast.models.placement import Placement
from effnet_fast.models.published import find_published, load_published
from effnet_fast.models.variants import B0_STAGES, VARIANTS, Stage, Variant, custom_variant
from effnet_fast.pretrained.weights import ENUMS, WeightsEnum

__all__ = [
    "VARIANTS",
    "EfficientNet",
    "EfficientNetFeatures",
    "FeatureInfo",
    "Stage",
    "Variant",
    "custom_variant",
    "efficientnet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_b8",
    "efficientnet_l2",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_lite3",
    "efficientnet_lite4",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
]


# Of networks without and with FusedMBConv.
SOURCES = ("https://arxiv.org/abs/1905.11946", "https://arxiv.org/abs/2104.00298")


def printed_name(variant: Variant) -> str:
    """ "B0", "Lite0", "V2-S"."""
    return "-".join(part.capitalize() for part in variant.name.split("_"))


class EntryPoint(Protocol):
    """Signature of efficientnet_b0 and its siblings."""

    __name__: str

    @overload
    def __call__(
        self,
        *,
        weights: WeightsEnum | str | None = None,
        progress: bool = True,
        num_classes: int = 1000,
        dropout: float | None = None,
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        global_pool: str = "avg",
        features_only: Literal[False] = False,
        out_indices: OutIndices | None = None,
        endpoints: str = "timm",
        backend: str = "auto",
        memory: str = "fast",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> EfficientNet: ...

    @overload
    def __call__(
        self,
        *,
        features_only: Literal[True],
        weights: WeightsEnum | str | None = None,
        progress: bool = True,
        num_classes: int = 1000,
        dropout: float | None = None,
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        global_pool: str = "avg",
        out_indices: OutIndices | None = None,
        endpoints: str = "timm",
        backend: str = "auto",
        memory: str = "fast",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> EfficientNetFeatures: ...


def _entry_point(name: str) -> EntryPoint:
    """The function that builds one variant."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: WeightsEnum | str | None = None,
        progress: bool = True,
        num_classes: int = 1000,
        dropout: float | None = None,
        stochastic_depth_prob: float = 0.2,
        norm_layer: Callable[..., nn.Module] | None = None,
        in_chans: int = 3,
        global_pool: str = "avg",
        features_only: bool = False,
        out_indices: OutIndices | None = None,
        endpoints: str = "timm",
        backend: str = "auto",
        memory: str = "fast",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        published = find_published(
            f"efficientnet_{name}", weights, 0 if features_only else num_classes
        )
        shared: dict[str, Any] = {
            "stochastic_depth_prob": stochastic_depth_prob,
            "norm_layer": norm_layer,
            "in_chans": in_chans,
            "backend": backend,
            "memory": memory,
        }
        placement = Placement.of(device, dtype)
        make: Callable[[], Any]
        if features_only:
            make = partial(
                EfficientNetFeatures,
                variant,
                out_indices=out_indices,
                endpoints=endpoints,
                **shared,
            )
        else:
            make = partial(
                EfficientNet,
                variant,
                num_classes=num_classes,
                dropout=dropout,
                global_pool=global_pool,
                **shared,
            )
        if published is None:
            return placement.build(make)
        load = partial(load_published, published=published, in_chans=in_chans, progress=progress)
        return placement.build(make, load)

    build.__name__ = build.__qualname__ = f"efficientnet_{name}"
    enum = ENUMS.get(build.__name__)
    choices = "None: none are published"
    if enum is not None:
        choices = f"None for random ones, or a member of `{enum.__name__}` or its name"
    build.__doc__ = f"""EfficientNet-{printed_name(variant)}, for images of about \
{variant.resolution} x {variant.resolution}.

    Args:
        weights: {choices}.
        progress: shows a progress bar on stderr while weights are downloaded.
        num_classes: number of logits, or 0 for no classifier; published weights have 1000. With
            weights="DEFAULT" any number goes: the classifier is then random where it is another.
        in_chans: channels of the images; the stem of published weights is adapted to them, see
            `effnet_fast.models.input_channels`.
        dropout, stochastic_depth_prob, norm_layer, global_pool, backend, memory: as in
            `EfficientNet`; dropout is {variant.dropout} unless given.
        features_only: build an `EfficientNetFeatures`, the encoder of the feature maps;
            num_classes, dropout and global_pool are then ignored.
        out_indices, endpoints: which maps the encoder returns, and whose choice they are, as in
            `EfficientNetFeatures`.
        device: where the network is built, None for PyTorch's default; on "meta" without memory,
            which takes no published weights.
        dtype: of its parameters and buffers, None for PyTorch's default; random weights are drawn
            in that default and rounded.

    torchvision's old forms are taken too, with a warning: `pretrained=True` or False, and weights
    and progress by position.

    Raises:
        ValueError, IndexError: an argument outside what is allowed; a file of weights that is not
            the published one.
        TypeError: weights of another network, or an argument of another type.
        RuntimeError: the device is not there.
        OSError: the weights cannot be downloaded, found or read.

    Source: Tan & Le, {SOURCES[variant.has_fused]}.
    """
    return takes_old_forms(build)


efficientnet_b0 = _entry_point("b0")
efficientnet_b1 = _entry_point("b1")
efficientnet_b2 = _entry_point("b2")
efficientnet_b3 = _entry_point("b3")
efficientnet_b4 = _entry_point("b4")
efficientnet_b5 = _entry_point("b5")
efficientnet_b6 = _entry_point("b6")
efficientnet_b7 = _entry_point("b7")
efficientnet_b8 = _entry_point("b8")
efficientnet_l2 = _entry_point("l2")
efficientnet_lite0 = _entry_point("lite0")
efficientnet_lite1 = _entry_point("lite1")
efficientnet_lite2 = _entry_point("lite2")
efficientnet_lite3 = _entry_point("lite3")
efficientnet_lite4 = _entry_point("lite4")
efficientnet_v2_s = _entry_point("v2_s")
efficientnet_v2_m = _entry_point("v2_m")
efficientnet_v2_l = _entry_point("v2_l")


@overload
def efficientnet(
    *,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: int = 224,
    stages: tuple[Stage, ...] = B0_STAGES,
    dropout: float = 0.2,
    features_only: Literal[False] = False,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> EfficientNet: ...


@overload
def efficientnet(
    *,
    features_only: Literal[True],
    depth: float = 1.0,
    width: float = 1.0,
    resolution: int = 224,
    stages: tuple[Stage, ...] = B0_STAGES,
    dropout: float = 0.2,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> EfficientNetFeatures: ...


def efficientnet(
    *,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: int = 224,
    stages: tuple[Stage, ...] = B0_STAGES,
    dropout: float = 0.2,
    features_only: bool = False,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> EfficientNet | EfficientNetFeatures:
    """An EfficientNet of any size, between, beyond or beside the published ones.

    Args:
        depth, width, resolution, stages, dropout: as for `custom_variant`. The network takes images
            of any side; its counts are for `resolution`.
        features_only: build an `EfficientNetFeatures`.
        device, dtype: as for `efficientnet_b0`.
        options: as for `EfficientNet`, or `EfficientNetFeatures`.

    Raises:
        ValueError, TypeError: as `custom_variant` and `EfficientNet`; another dtype or device.
        RuntimeError: the device is not there.
    """
    variant = custom_variant(
        depth=depth, width=width, resolution=resolution, stages=stages, dropout=dropout
    )
    kind = EfficientNetFeatures if features_only else EfficientNet
    return Placement.of(device, dtype).build(partial(kind, variant, **options))
