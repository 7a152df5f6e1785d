"""Which module launches the registered ops on which backend; the CPU's stand beside their ops."""

from __future__ import annotations

from effnet_fast.backends import CUDA, SIMT, TRITON

_DWCONV = ("dwconv_bn_silu_eval", "dwconv_statistics", "bn_silu", "dwconv_bn_silu_backward")
_SQUEEZE_EXCITE = ("excite", "squeeze_excite", "squeeze_excite_backward")
_STEM = (
    "stem_conv_bn_silu_eval", "stem_conv", "norm_silu", "norm_silu_sums", "stem_weight_backward"
)  # fmt: skip
_HEAD = ("pointwise_bn_silu_pool_eval", "pointwise_bn_silu_pool_backward")
_PASSES = (
    "mbconv_expand", "mbconv_depthwise", "mbconv_squeeze", "mbconv_project", "mbconv_finish",
    "mbconv_finish_backward", "mbconv_project_backward", "mbconv_excite_backward",
    "mbconv_depthwise_backward", "mbconv_expand_backward",
)  # fmt: skip

for backend in (CUDA, SIMT):
    backend.add_launchers("effnet_fast.ops.cuda.dwconv_bn_silu", _DWCONV)
    backend.add_launchers("effnet_fast.ops.cuda.squeeze_excite", _SQUEEZE_EXCITE)
TRITON.add_launchers("effnet_fast.triton_kernels.dwconv_bn_silu", _DWCONV)
TRITON.add_launchers("effnet_fast.triton_kernels.squeeze_excite", _SQUEEZE_EXCITE)
TRITON.add_launchers("effnet_fast.triton_kernels.stem_conv_bn_silu", _STEM)
TRITON.add_launchers("effnet_fast.triton_kernels.pointwise_bn_act", ("pointwise_bn_act_eval",))
TRITON.add_launchers("effnet_fast.triton_kernels.pointwise_bn_silu_pool", _HEAD)
TRITON.add_launchers("effnet_fast.triton_kernels.mbconv", ("mbconv_eval",))
TRITON.add_launchers("effnet_fast.triton_kernels.mbconv_passes", _PASSES)
