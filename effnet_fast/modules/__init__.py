"""The modules of EfficientNet, what they consist of, and their fused forward."""

from effnet_fast.modules import layers
from effnet_fast.modules.readers import fused_mbconv, own

__all__ = ["fused_mbconv", "layers", "own"]
