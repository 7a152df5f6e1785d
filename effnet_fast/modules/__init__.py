"""The modules of EfficientNet, what they consist of, and their fused forward."""

from effnet_fast.modules import layers
from effnet_fast.modules.readers import lukemelas, own, timm, torchvision

__all__ = ["layers", "lukemelas", "own", "timm", "torchvision"]
