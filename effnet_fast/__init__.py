"""EfficientNet on fused kernels.

Everything is imported on first use, so that ``import effnet_fast`` costs little beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODELS = tuple(f"efficientnet_{size}" for size in (*(f"b{i}" for i in range(9)), "l2"))
_WEIGHTS = tuple(f"EfficientNet_B{i}_Weights" for i in range(8))
_EXPORTS = {
    **dict.fromkeys(_MODELS, "models"),
    **dict.fromkeys((*_WEIGHTS, "get_model_weights", "get_weight"), "pretrained.weights"),
    "EfficientNet": "models",
    "EfficientNetFeatures": "models",
    "efficientnet": "models",
    "current_backend": "backends",
    "use_backend": "backends",
    "deploy": "deployment",
    "doctor": "diagnostics",
}
_SUBMODULES = {
    **{name: name for name in ("backends", "checkpoints", "models", "ops", "reference", "scaling")},
    "weights": "pretrained.weights",
}

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from . import backends, checkpoints, models, ops, reference, scaling
    from .backends import current_backend, use_backend
    from .deployment import deploy
    from .diagnostics import doctor
    from .models import *  # noqa: F403
    from .pretrained import weights
    from .pretrained.weights import (
        EfficientNet_B0_Weights,
        EfficientNet_B1_Weights,
        EfficientNet_B2_Weights,
        EfficientNet_B3_Weights,
        EfficientNet_B4_Weights,
        EfficientNet_B5_Weights,
        EfficientNet_B6_Weights,
        EfficientNet_B7_Weights,
        get_model_weights,
        get_weight,
    )


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{_SUBMODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
