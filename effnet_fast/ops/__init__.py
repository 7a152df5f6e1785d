"""The fused ops: checked, registered with torch.library, differentiable.

Each has an eager twin of the same name and signature in `effnet_fast.reference`.
"""

from effnet_fast.ops import launchers as launchers  # tells the backends theirs
from effnet_fast.ops.dwconv_bn_silu import dwconv_bn_silu
from effnet_fast.ops.mbconv import mbconv
from effnet_fast.ops.pointwise_bn_act import pointwise_bn_act
from effnet_fast.ops.pointwise_bn_silu_pool import pointwise_bn_silu_pool
from effnet_fast.ops.squeeze_excite import squeeze_excite
from effnet_fast.ops.stem_conv_bn_silu import stem_conv_bn_silu

__all__ = [
    "dwconv_bn_silu",
    "mbconv",
    "pointwise_bn_act",
    "pointwise_bn_silu_pool",
    "squeeze_excite",
    "stem_conv_bn_silu",
]
