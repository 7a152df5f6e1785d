"""EfficientNet on fused kernels.

Everything is imported on first use, so that ``import effnet_fast`` costs little beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODELS = tuple(f"efficientnet_{size}" for size in (*(f"b{i}" for i in range(9)), "l2"))
_EXPORTS = {
    **dict.fromkeys(_MODELS, "models"),
    "EfficientNet": "models",
    "EfficientNetFeatures": "models",
    "efficientnet": "models",
    "current_backend": "backends",
    "use_backend": "backends",
    "doctor": "diagnostics",
}
_SUBMODULES = ("backends", "checkpoints", "models", "ops", "reference", "scaling")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from . import backends, checkpoints, models, ops, reference, scaling
    from .backends import current_backend, use_backend
    from .diagnostics import doctor
    from .models import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
