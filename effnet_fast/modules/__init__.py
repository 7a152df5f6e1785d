"""The modules of EfficientNet, what they consist of, and their fused forward."""

from effnet_fast.modules import layers
from effnet_fast.modules.readers import (
    lukemelas,
    monai,
    nvidia,
    own,
    timm,
    torchvision,
    transformers,
)

__all__ = ["layers", "lukemelas", "monai", "nvidia", "own", "timm", "torchvision", "transformers"]
