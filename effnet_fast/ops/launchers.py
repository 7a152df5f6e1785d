"""Which module launches the registered ops on which backend, in functions of the ops' names."""

from __future__ import annotations

from effnet_fast.backends import CPU, CUDA, SIMT, TRITON

_DWCONV = ("dwconv_bn_silu_eval", "dwconv_statistics", "bn_silu", "dwconv_bn_silu_backward")
_SQUEEZE_EXCITE = ("excite", "squeeze_excite", "squeeze_excite_backward")
_STEM = (
    "stem_conv_bn_silu_eval", "stem_conv", "norm_silu", "norm_silu_sums", "norm_silu_backward",
    "stem_weight_backward",
)  # fmt: skip
_HEAD = ("pointwise_bn_silu_pool_eval", "pointwise_bn_silu_pool_backward")
_PASSES = (
    "mbconv_expand", "mbconv_depthwise", "mbconv_squeeze", "mbconv_project", "mbconv_finish",
    "mbconv_finish_backward", "mbconv_project_backward", "mbconv_excite_backward",
    "mbconv_depthwise_backward", "mbconv_expand_backward",
)  # fmt: skip

_MODULES = {
    "dwconv_bn_silu": _DWCONV,
    "squeeze_excite": _SQUEEZE_EXCITE,
    "stem_conv_bn_silu": _STEM,
    "pointwise_bn_act": ("pointwise_bn_act_eval",),
    "pointwise_bn_silu_pool": _HEAD,
    "mbconv": ("mbconv_eval",),
    "mbconv_passes": _PASSES,
}
_IN_CUDA = ("dwconv_bn_silu", "squeeze_excite")

CPU.add_launchers("effnet_fast.ops.cpu.dense_conv", ("norm_statistics",))
# No registered ops: all passes of a block where nobody watches these.
CPU.add_launchers(
    "effnet_fast.ops.cpu.mbconv_block", ("mbconv_block_forward", "mbconv_block_backward")
)
for _module, _ops in _MODULES.items():
    CPU.add_launchers(f"effnet_fast.ops.cpu.{_module}", _ops)
    TRITON.add_launchers(f"effnet_fast.triton_kernels.{_module}", _ops)
    if _module in _IN_CUDA:
        CUDA.add_launchers(f"effnet_fast.ops.cuda.{_module}", _ops)
        SIMT.add_launchers(f"effnet_fast.ops.cuda.{_module}", _ops)
