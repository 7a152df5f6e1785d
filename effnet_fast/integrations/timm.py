"""The networks in timm's registry, under names like "effnet_fast_b0".

Source: conventions of timm 1.0, timm/models/_builder.py and timm/models/efficientnet.py,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.checkpoints.parameter_names import first_of
from effnet_fast.models.efficientnet import EfficientNet, EfficientNetFeatures
from effnet_fast.models.placement import Placement
from effnet_fast.models.published import load_published
from effnet_fast.models.variants import VARIANTS, Variant
from effnet_fast.pretrained.weights import ENUMS, WeightsEnum

__all__ = ["register_timm"]

PREFIX = "effnet_fast_"
FIRST_CONV, CLASSIFIER = "features.0.0", "classifier.1"
FEATURES_FILTER: Any = ("num_classes", "global_pool", "drop_rate")  # an encoder has no head
SOURCES = ("source", "file", "state_dict", "hf_hub_id")  # entries that name other weights

default_cfgs: dict[str, Any] = {}  # read by timm's register_model, which looks into this module


def register_timm() -> list[str]:
    """Registers every network with timm, so that `timm.create_model("effnet_fast_b0")` builds it.

    Arguments of `create_model` that timm's own EfficientNets take: pretrained (published weights,
    whose tags are torchvision's names in lower case), num_classes, in_chans, global_pool, drop_rate
    and drop_path_rate (0 unless given, as in timm), norm_layer, bn_eps, bn_momentum, features_only
    with out_indices, feature_cls, checkpoint_path, pretrained_cfg, pretrained_cfg_overlay,
    cache_dir, device and dtype; besides backend and memory as in `EfficientNet`. Another
    output_stride than 32 is refused. Weights from elsewhere must have this package's names.

    Returns:
        The names. A second call changes nothing.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.models import generate_default_cfgs, is_model, model_entrypoint, register_model
    except ImportError as error:
        raise ImportError(
            'timm is needed for register_timm: pip install "effnet-fast[timm]" (or timm)'
        ) from error
    names = []
    for variant in VARIANTS.values():
        name = f"{PREFIX}{variant.name}"
        names.append(name)
        if is_model(name) and model_entrypoint(name) is globals().get(name):
            continue
        default_cfgs.update(generate_default_cfgs(_configurations(variant)))
        globals()[name] = _entry_point(name, variant)
        register_model(globals()[name])
    return names


def _entry_point(name: str, variant: Variant) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, variant, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"The network of variant {variant.name!r}, as timm.create_model builds it."
    return build


def _published(variant: Variant) -> list[WeightsEnum]:
    """The published weights, the best first."""
    enum = ENUMS.get(f"efficientnet_{variant.name}")
    if enum is None:
        return []
    best = enum["DEFAULT"]
    return [best, *(member for member in enum if member is not best)]


def _configurations(variant: Variant) -> dict[str, Any]:
    """Pretrained configurations by "name.tag", the default first."""
    name = f"{PREFIX}{variant.name}"
    own = _configuration(
        variant.crop, variant.resize, variant.interpolation, variant.mean, variant.std
    )
    found = {}
    for member in _published(variant):
        preset = member.transforms()
        images = _configuration(
            preset.crop_size[0],
            preset.resize_size[0],
            preset.interpolation,
            preset.mean,
            preset.std,
        )
        found[f"{name}.{member.name.lower()}"] = {**images, "url": member.url}
    return found or {f"{name}.untrained": own}


def _configuration(
    crop: int, resize: int, interpolation: Any, mean: Any, std: Any
) -> dict[str, Any]:
    side = math.ceil(crop / 32)
    return {
        "num_classes": 1000,
        "input_size": (3, crop, crop),
        "pool_size": (side, side),
        "crop_pct": crop / resize,
        "interpolation": str(interpolation),
        "mean": tuple(mean),
        "std": tuple(std),
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
    }


def _create(
    name: str,
    variant: Variant,
    pretrained: bool,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """What timm's own `_create_effnet` does, with this package's networks."""
    from timm.models import build_model_with_cfg, resolve_pretrained_cfg
    from timm.models._builder import pretrained_cfg_for_features

    configuration = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    published = _published_of(variant, configuration) if pretrained else None
    # A wrapper of timm's is asked for: it takes a classifier apart.
    wraps = features_only and not kwargs.keys().isdisjoint({"feature_cls", "feature_cfg"})
    encodes = features_only and not wraps
    kind = EfficientNetFeatures if encodes else EfficientNet
    if wraps:
        given = dict(kwargs.pop("feature_cfg", None) or {})
        kwargs["feature_cfg"] = {"flatten_sequential": True, **given}
    model: Any = build_model_with_cfg(
        partial(_build, kind, variant, published, cache_dir),
        name,
        pretrained and published is None,
        pretrained_cfg=configuration.to_dict(),
        pretrained_filter_fn=_own_names,
        cache_dir=cache_dir,
        features_only=wraps,
        kwargs_filter=FEATURES_FILTER if encodes else None,
        **kwargs,
    )
    if encodes:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


def _published_of(variant: Variant, configuration: Any) -> WeightsEnum | None:
    """The published weights that a configuration stands for, if it names no others."""
    if any(getattr(configuration, source) for source in SOURCES):
        return None
    found = [member for member in _published(variant) if member.url == configuration.url]
    return found[0] if found else None


def _build(
    kind: type[EfficientNet] | type[EfficientNetFeatures],
    variant: Variant,
    published: WeightsEnum | None,
    cache_dir: str | os.PathLike[str] | None,
    *,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    output_stride: int = 32,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A network by timm's names of the arguments, with published weights if there are some."""
    if output_stride != 32:
        raise ValueError(f"output_stride must be 32, got {output_stride!r}: strides are fixed")
    if bn_eps is not None:
        variant = replace(variant, bn_eps=bn_eps)
    if bn_momentum is not None:
        variant = replace(variant, bn_momentum=bn_momentum)
    if kind is EfficientNet:
        options["dropout"] = drop_rate
    make = partial(
        kind, variant, stochastic_depth_prob=drop_path_rate, in_chans=in_chans, **options
    )
    placement = Placement.of(device, dtype)
    if published is None:
        return placement.build(make)
    folder = None if published.package else cache_dir
    load = partial(
        load_published, published=published, in_chans=in_chans, progress=False, model_dir=folder
    )
    return placement.build(make, load)


def _own_names(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter of a file's state: refuses the names of another package's networks.

    Their padding and eps may differ, so that their weights would give other numbers here.

    Raises:
        ValueError: the weights of a layer other than the classifier are missing.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.startswith("classifier.")]
    if missing:
        raise ValueError(
            f"weights of another network: {first_of(missing)} missing. "
            "effnet_fast.EfficientNet.from_checkpoint builds the network that goes with a file of "
            "timm's or another package's"
        )
    return dict(state)
