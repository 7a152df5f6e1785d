"""Eager PyTorch definitions of the ops: the truth that every backend is held against.

The functions bear the public names and signatures of `effnet_fast.ops`, without `backend`.
They take any floating dtype, are differentiable by autograd (twice, too), and never overwrite
an input; in training mode they update the running statistics in place, as BatchNorm2d does.
"""

from effnet_fast.reference.dwconv_bn_silu import dwconv_bn_silu
from effnet_fast.reference.mbconv import mbconv
from effnet_fast.reference.pointwise_bn_act import pointwise_bn_act
from effnet_fast.reference.pointwise_bn_silu_pool import pointwise_bn_silu_pool
from effnet_fast.reference.squeeze_excite import squeeze_excite
from effnet_fast.reference.stem_conv_bn_silu import stem_conv_bn_silu

__all__ = [
    "dwconv_bn_silu",
    "mbconv",
    "pointwise_bn_act",
    "pointwise_bn_silu_pool",
    "squeeze_excite",
    "stem_conv_bn_silu",
]
