"""Entry points of torch.hub: `torch.hub.load("...", "efficientnet_b0", weights="DEFAULT")`.

Each is the function of the same name in effnet_fast. A clone has no compiled kernels: where the
package is installed, that installation is used as a whole; elsewhere PyTorch runs the networks.
"""

from effnet_fast import (
    efficientnet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
    efficientnet_b8,
    efficientnet_l2,
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    efficientnet_lite3,
    efficientnet_lite4,
    efficientnet_v2_l,
    efficientnet_v2_m,
    efficientnet_v2_s,
    get_model_weights,
    get_weight,
)

dependencies = ["torch", "numpy", "PIL", "safetensors", "tqdm"]

__all__ = [
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
    "get_model_weights",
    "get_weight",
]
