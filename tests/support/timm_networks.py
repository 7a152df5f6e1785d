"""timm's EfficientNet carrying the same weights as ours: both register them in the same order."""

from __future__ import annotations

import functools

import timm
import torch
from torch import nn

import networks
from effnet_fast.models import VARIANTS, EfficientNet

RESOLUTION = 64


@functools.cache
def _state() -> dict[str, torch.Tensor]:
    return networks.calibrated_state(VARIANTS["b0"], RESOLUTION)


def ours(**options: object) -> EfficientNet:
    """B0 in eval mode, well-conditioned at RESOLUTION."""
    model = EfficientNet("b0", **options)  # type: ignore[arg-type]
    missing = model.load_state_dict(_state(), strict=False).missing_keys
    assert not missing
    return model.eval()


def theirs(**options: object) -> nn.Module:
    """timm's B0 with the weights of `ours`, those of layers that it lacks left out."""
    model = timm.create_model("efficientnet_b0", **options)
    keys = model.state_dict()
    state = dict(zip(keys, _state().values(), strict=False))
    model.load_state_dict({k: state[k] for k in keys})
    return model.eval()
