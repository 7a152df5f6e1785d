"""EfficientNet on fused kernels.

Everything is imported on first use, so that ``import effnet_fast`` costs little beyond torch.
A source tree without compiled kernels gives way to an installed copy of the package, as a whole:
Python files and kernels always come from one installation.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_V2 = ("v2_s", "v2_m", "v2_l")
_SIZES = (*(f"b{i}" for i in range(9)), "l2", *(f"lite{i}" for i in range(5)), *_V2)
_MODELS = tuple(f"efficientnet_{size}" for size in _SIZES)
_PUBLISHED = (
    *(f"B{i}" for i in range(8)),
    *(f"Lite{i}" for i in range(3)),
    *(size.upper() for size in _V2),
)
_WEIGHTS = tuple(f"EfficientNet_{size}_Weights" for size in _PUBLISHED)
_EXPORTS = {
    **dict.fromkeys(_MODELS, "models"),
    **dict.fromkeys((*_WEIGHTS, "get_model_weights", "get_weight"), "pretrained.weights"),
    "EfficientNet": "models",
    "EfficientNetFeatures": "models",
    "efficientnet": "models",
    "current_backend": "backends",
    "use_backend": "backends",
    "accelerate": "acceleration",
    "deploy": "deployment",
    "doctor": "diagnostics",
    "empty_cache": "ops.scratch",
    "register_timm": "integrations.timm",
    "restore": "acceleration",
}
_SUBMODULES = {
    **{name: name for name in ("backends", "checkpoints", "models", "ops", "reference", "scaling")},
    "weights": "pretrained.weights",
}

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from . import backends, checkpoints, models, ops, reference, scaling
    from .acceleration import accelerate, restore
    from .backends import current_backend, use_backend
    from .deployment import deploy
    from .diagnostics import doctor
    from .integrations.timm import register_timm
    from .models import *  # noqa: F403
    from .ops.scratch import empty_cache
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
        EfficientNet_Lite0_Weights,
        EfficientNet_Lite1_Weights,
        EfficientNet_Lite2_Weights,
        EfficientNet_V2_L_Weights,
        EfficientNet_V2_M_Weights,
        EfficientNet_V2_S_Weights,
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


def _give_way() -> None:
    """Replaces this module by an installed copy with kernels, where its own folder has none."""
    find = importlib.machinery.PathFinder.find_spec
    if find(f"{__name__}._C", __path__):  # noqa: F405
        return
    for entry in sys.path:
        spec = find(__name__, [entry])
        folder = spec.submodule_search_locations if spec else None
        # Other source trees do not count: their Triton kernels lie outside the folder.
        if not folder or not all(find(f"{__name__}.{x}", folder) for x in ("_C", "triton_kernels")):
            continue
        assert spec is not None and spec.loader is not None
        module = sys.modules[__name__] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return


_give_way()
