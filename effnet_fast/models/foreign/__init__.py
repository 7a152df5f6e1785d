"""Networks of other packages: what their forward runs, and a forward that runs it fused.

A network that `accelerate` has met runs whole from packed weights in eval mode on a CPU, as this
package's own do, and elsewhere layer by layer with activations in channels_last between them.
"""

from effnet_fast.models.foreign import (
    lukemelas,
    monai,
    nvidia,
    smp,
    timm,
    torchvision,
    transformers,
)
from effnet_fast.modules.foreign import learn

__all__ = [
    "learn",
    "lukemelas",
    "monai",
    "nvidia",
    "smp",
    "timm",
    "torchvision",
    "transformers",
]
